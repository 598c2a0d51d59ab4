import { CommanderError } from 'commander'

import { type Job, KintsugiError } from '../index.js'
import { showProgress } from './progress.js'
import { colorsFor } from './terminal.js'

/** What a command works with. */
export interface CommandContext {
  /** Aborts when the user interrupts. */
  signal: AbortSignal
  /** Awaits a job and shows its progress on stderr. */
  follow<T>(job: Job<T>, label: string): Promise<T>
}

/** What a command found: one document for `--json`, or the same for a reader. */
export interface Outcome {
  document: unknown
  text: string
  /** Exit code, default 0. */
  exitCode?: number
}

const EXIT_FAILED = 1
const EXIT_USAGE = 2

/**
 * Runs a command: prints its outcome on stdout, or its failure on stderr (with `--json` on stdout as well), and sets
 * the exit code. The first SIGINT cancels the work, which then cleans up; a second one ends the process.
 */
export async function runCommand(
  json: boolean | undefined,
  work: (context: CommandContext) => Promise<Outcome>,
): Promise<void> {
  const interruption = new AbortController()
  const interrupt = (): void => {
    interruption.abort(new KintsugiError({ code: 'ERR_CANCELLED', message: 'interrupted' }))
  }
  process.once('SIGINT', interrupt)
  try {
    const outcome = await work({
      signal: interruption.signal,
      follow: (job, label) => showProgress(job, label, process.stderr),
    })
    process.stdout.write(`${json ? JSON.stringify(outcome.document, null, 2) : outcome.text}\n`)
    process.exitCode = outcome.exitCode ?? 0
  } catch (error) {
    reportFailure(error, json ?? false)
  } finally {
    process.off('SIGINT', interrupt)
  }
}

/** Prints what failed and sets the exit code. */
export function reportFailure(error: unknown, json: boolean): void {
  if (error instanceof CommanderError && error.exitCode === 0) return
  if (error instanceof CommanderError && error.code === 'commander.help') {
    process.exitCode = EXIT_USAGE // the parser has printed the help
    return
  }
  const failure = error instanceof CommanderError ? usageError(error) : typed(error)
  const wrongUsage = failure.code === 'ERR_OPTION_INVALID' || failure.code === 'ERR_OPTION_UNKNOWN'
  process.exitCode = wrongUsage ? EXIT_USAGE : EXIT_FAILED

  const colors = colorsFor(process.stderr)
  const lines = [`${colors.red(colors.bold('kintsugi:'))} ${failure.message} ${colors.dim(`[${failure.code}]`)}`]
  if (failure.subject) lines.push(`  ${colors.dim('about:')} ${failure.subject}`)
  if (failure.hint) lines.push(`  ${colors.dim('try:')}   ${failure.hint}`)
  process.stderr.write(`${lines.join('\n')}\n`)
  if (json) process.stdout.write(`${JSON.stringify({ error: failure.toJSON() }, null, 2)}\n`)
}

function typed(error: unknown): KintsugiError {
  if (error instanceof KintsugiError) return error
  const message = error instanceof Error ? error.message : String(error)
  return new KintsugiError({ code: 'ERR_INTERNAL', message, cause: error })
}

/** The parser's words in our form: `error: unknown option '--bit'\n(Did you mean --bits?)`. */
function usageError(error: CommanderError): KintsugiError {
  const [first = '', ...rest] = error.message.split('\n')
  const suggestion = rest.join(' ').replace(/^\(|\)$/g, '')
  const help = 'See `kintsugi --help`, or `kintsugi COMMAND --help`.'
  return new KintsugiError({
    code: error.code.startsWith('commander.unknown') ? 'ERR_OPTION_UNKNOWN' : 'ERR_OPTION_INVALID',
    message: first.replace(/^error: /, ''),
    subject: /'([^']+)'/.exec(first)?.[1] ?? '',
    hint: suggestion ? `${suggestion} ${help}` : help,
  })
}

import type { Job, Progress } from '../index.js'
import { formatSeconds } from './format.js'
import { colorsFor, type Output } from './terminal.js'

const PLAIN_INTERVAL_MILLISECONDS = 5000
const BAR_WIDTH = 24
const CLEAR_LINE = '\r\u001B[K'

/**
 * Awaits `job` and shows how far it is: on a terminal a bar that disappears at the end, elsewhere a plain line every
 * few seconds.
 */
export async function showProgress<T>(job: Job<T>, label: string, output: Output): Promise<T> {
  const show = output.isTTY ? bar(label, output) : plainLines(label, output)
  for await (const reading of job.progress()) show(reading)
  if (output.isTTY) output.write(CLEAR_LINE)
  return job
}

function bar(label: string, output: Output): (reading: Progress) => void {
  const colors = colorsFor(output)
  return ({ phase, done, total, unit, secondsLeft }) => {
    const filled = total > 0 ? Math.round((done / total) * BAR_WIDTH) : 0
    const share = total > 0 ? `${Math.floor((done / total) * 100)} %`.padStart(6) : '      '
    const left = secondsLeft === undefined ? '' : ` · ${formatSeconds(secondsLeft)} left`
    const detail = `${phase}${unit && ` ${unit}`}${left}`
    const room = (output.columns ?? 80) - label.length - BAR_WIDTH - share.length - 6
    output.write(
      `${CLEAR_LINE}${label} ${colors.yellow('━'.repeat(filled))}${colors.dim('━'.repeat(BAR_WIDTH - filled))}` +
        `${share} ${colors.dim(shorten(detail, room))}`,
    )
  }
}

function plainLines(label: string, output: Output): (reading: Progress) => void {
  let last = performance.now()
  return ({ phase, done, total, unit, secondsLeft }) => {
    if (performance.now() - last < PLAIN_INTERVAL_MILLISECONDS) return
    last = performance.now()
    const left = secondsLeft === undefined ? '' : `, ${formatSeconds(secondsLeft)} left`
    output.write(`${label}: ${phase} ${total > 0 ? `${done} of ${total}` : done}${unit && ` ${unit}`}${left}\n`)
  }
}

function shorten(text: string, room: number): string {
  if (text.length <= room) return text
  return room > 1 ? `${text.slice(0, room - 1)}…` : ''
}

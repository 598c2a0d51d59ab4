#!/usr/bin/env node
import { readFileSync } from 'node:fs'

import { Command } from 'commander'

import { registerBench } from './bench.js'
import { registerCompensate } from './compensate.js'
import { registerCompress } from './compress.js'
import { registerConvert } from './convert.js'
import { registerDoctor } from './doctor.js'
import { registerEval } from './eval.js'
import { registerFold } from './fold.js'
import { registerGenerate } from './generate.js'
import { registerInspect } from './inspect.js'
import { registerMerge } from './merge.js'
import { registerRemerge } from './remerge.js'
import { reportFailure } from './run-command.js'

const { version } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
  version: string
}

const program = new Command('kintsugi')
  .description('Break a language model to a few bits, and mend it.')
  .version(version)
  .exitOverride()
  // Failures are printed in one place, reportFailure.
  .configureOutput({ outputError: () => {} })

registerInspect(program)
registerCompress(program)
registerCompensate(program)
registerConvert(program)
registerMerge(program)
registerRemerge(program)
registerFold(program)
registerEval(program)
registerGenerate(program)
registerDoctor(program)
registerBench(program)

// A reader that has seen enough (`| head`) is no failure.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error
  process.exit()
})

try {
  await program.parseAsync()
} catch (error) {
  reportFailure(error, process.argv.includes('--json'))
}

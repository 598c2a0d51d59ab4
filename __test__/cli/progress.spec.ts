import test from 'ava'

import { showProgress } from '../../src/cli/progress.js'
import { stripColors } from '../../src/cli/terminal.js'
import { Job, type Progress } from '../../src/job.js'

/** A job that goes through `readings`, one per poll. */
function jobWith(readings: Progress[]): Job<string> {
  let finish!: (value: string) => void
  const result = new Promise<string>((resolve) => {
    finish = resolve
  })
  const control = {
    cancel: () => {},
    progress: () => {
      const reading = readings.length > 1 ? readings.shift()! : readings[0]!
      if (readings.length === 1) finish('result')
      return reading
    },
  }
  return new Job(() => ({ control, result }))
}

const READINGS: Progress[] = [
  { phase: 'calibrate', done: 0, total: 4, unit: 'model.layers.0' },
  { phase: 'compress', done: 3, total: 4, unit: 'model.layers.3', secondsLeft: 12 },
]

test('a terminal gets a bar that disappears', async (t) => {
  let written = ''
  const output = { isTTY: true, columns: 80, write: (text: string) => ((written += text), true) }
  t.is(await showProgress(jobWith([...READINGS]), 'compress', output), 'result')
  const lines = stripColors(written).split('\r\u001B[K')
  t.is(lines.at(-1), '')
  t.regex(lines.at(-2)!, /^compress ━{24}\s+75 % compress model\.layers\.3 · 12 s left$/)
  for (const line of lines) t.true([...line].length < 80)
})

test('a pipe gets nothing from a job that is soon over', async (t) => {
  let written = ''
  const output = { write: (text: string) => ((written += text), true) }
  t.is(await showProgress(jobWith([...READINGS]), 'compress', output), 'result')
  t.is(written, '')
})

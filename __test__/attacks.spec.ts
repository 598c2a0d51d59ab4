// Walks attacks/: every trick is refused with its code and subject, in bounded time and memory, and leaves nothing.
import { type ChildProcess, fork } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { basename, join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'

import test from 'ava'

import type { Attack } from './attacks/attack.js'
import type { Report } from './attacks/runner.js'

const FOLDER = fileURLToPath(new URL('attacks', import.meta.url))
/** No refusal takes a second; this is how a hang shows. */
const PATIENCE = 30_000
/** What a call may need whatever it is given (threads, caches), and per byte of its files. */
const MEMORY = 64 << 20
const MEMORY_PER_BYTE = 16

let child: ChildProcess | undefined

function attack(path: string): Promise<Report> {
  child ??= fork(join(FOLDER, 'runner.ts'), { execArgv: ['--import=tsx'], stdio: ['ignore', 'pipe', 'pipe', 'ipc'] })
  const runner = child
  let noise = ''
  const listen = (text: Buffer): void => {
    noise += text.toString()
  }
  const streams = [runner.stdout!, runner.stderr!]
  for (const stream of streams) stream.on('data', listen)
  return new Promise<Report>((resolve, reject) => {
    const fail = (message: string): void => {
      runner.kill('SIGKILL')
      child = undefined
      reject(new Error(`${message}\n${noise}`))
    }
    const timer = setTimeout(() => fail(`no answer after ${PATIENCE / 1000} s`), PATIENCE)
    const onExit = (code: number | null, signal: string | null): void => fail(`the process ended: ${signal ?? code}`)
    runner.once('exit', onExit)
    runner.once('message', (answer: Report | { failed: string }) => {
      clearTimeout(timer)
      runner.off('exit', onExit)
      // What was printed before the answer may still be on its way.
      setTimeout(() => {
        if ('failed' in answer) reject(new Error(answer.failed))
        else if (noise !== '') reject(new Error(`the library printed: ${noise}`))
        else resolve(answer)
      }, 20)
    })
    runner.send(path)
  }).finally(() => {
    for (const stream of streams) stream.off('data', listen)
  })
}

interface Trick {
  title: string
  path: string
  expected: Attack
}

const TRICKS: Trick[] = []
for (const area of readdirSync(FOLDER, { withFileTypes: true }).filter((entry) => entry.isDirectory())) {
  for (const file of readdirSync(join(FOLDER, area.name)).sort()) {
    const path = join(FOLDER, area.name, file)
    const { default: expected } = (await import(pathToFileURL(path).href)) as { default: Attack }
    TRICKS.push({ title: `${area.name}: ${basename(file, '.ts')}`, path, expected })
  }
}

// Everything is imported: tests are declared in one go.
test.after.always(() => child?.kill())

for (const { title, path, expected } of TRICKS) {
  const run = expected.unix === true && process.platform === 'win32' ? test.skip : test.serial
  run(title, async (t) => {
    const { outcomes, bytes } = await attack(path)
    t.deepEqual(
      outcomes.map(({ door }) => door),
      [...expected.doors],
    )
    for (const { door, error, left, growth } of outcomes) {
      if (expected.code === null) {
        t.is(error, null, `${door}: ${error?.code}: ${error?.message}`)
      } else {
        t.is(error?.code, expected.code, `${door}: ${error?.message}`)
        t.regex(error?.subject ?? '', expected.subject!, `${door}: ${error?.message}`)
        t.not(error?.hint, '', door)
        t.deepEqual(left, [], `${door} left something behind`)
      }
      const allowed = MEMORY + MEMORY_PER_BYTE * bytes
      t.true(growth === null || growth <= allowed, `${door} grew by ${growth} bytes, ${allowed} are allowed`)
    }
  })
}

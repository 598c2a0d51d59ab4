// A process of its own for the attacks: whatever hangs, crashes or eats the memory of it does not take the tests along.
import { lstatSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'

import { KintsugiError } from 'kintsugi'

import { type Attack, type Door, DOORS } from './attack.js'

/** What a call said. */
export interface Outcome {
  door: Door
  error: null | { code: string; subject: string; message: string; hint: string }
  /** What was there afterwards and not before. */
  left: string[]
  /** Bytes by which the process was larger than before, at its peak; `null` where the system does not tell. */
  growth: number | null
}

/** Bytes on the disk of what the attack consists of. */
export interface Report {
  outcomes: Outcome[]
  bytes: number
}

const everything = (folder: string): string[] => (readdirSync(folder, { recursive: true }) as string[]).sort()

/** A line of `/proc/self/status`, in bytes. */
function memory(line: string): number {
  const text = readFileSync('/proc/self/status', 'utf8')
  return 1024 * Number(new RegExp(`^${line}:\\s*(\\d+)`, 'm').exec(text)![1])
}

async function growthOf(work: () => Promise<void>): Promise<number | null> {
  let before: number
  try {
    writeFileSync('/proc/self/clear_refs', '5')
    before = memory('VmHWM')
  } catch {
    await work()
    return null
  }
  await work()
  return memory('VmHWM') - before
}

async function run(path: string): Promise<Report> {
  const { default: attack } = (await import(pathToFileURL(path).href)) as { default: Attack }
  const outcomes: Outcome[] = []
  let bytes = 0
  for (const door of attack.doors) {
    const folder = mkdtempSync(join(tmpdir(), 'kintsugi-attack-'))
    try {
      attack.make(folder)
      const before = everything(folder)
      bytes = before.reduce((sum, name) => sum + 512 * (lstatSync(join(folder, name)).blocks ?? 0), 0)
      let error: Outcome['error'] = null
      const growth = await growthOf(async () => {
        try {
          await DOORS[door](folder, attack.prompt)
        } catch (caught) {
          const { code, subject, message, hint } = caught as KintsugiError
          error =
            caught instanceof KintsugiError
              ? { code, subject, message, hint }
              : { code: 'no KintsugiError', subject: '', message: String(caught), hint: '' }
        }
      })
      outcomes.push({ door, error, left: everything(folder).filter((name) => !before.includes(name)), growth })
    } finally {
      rmSync(folder, { recursive: true, force: true })
    }
  }
  return { outcomes, bytes }
}

process.on('message', (path: string) => {
  run(path).then(
    (report) => process.send!(report),
    (error: unknown) => process.send!({ failed: String(error instanceof Error ? error.stack : error) }),
  )
})

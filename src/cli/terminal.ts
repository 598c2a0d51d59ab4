import type { WriteStream } from 'node:tty'

import picocolors from 'picocolors'

/** Where the CLI writes: a terminal, or a pipe or file. */
export type Output = Pick<NodeJS.WritableStream, 'write'> & Partial<Pick<WriteStream, 'isTTY' | 'columns'>>

/** Colours for `output`: on a terminal only, `NO_COLOR` and `FORCE_COLOR` obeyed. */
export function colorsFor(output: Output): ReturnType<typeof picocolors.createColors> {
  const { FORCE_COLOR, NO_COLOR, TERM } = process.env
  const asked = Boolean(FORCE_COLOR) && FORCE_COLOR !== '0'
  return picocolors.createColors(asked || (Boolean(output.isTTY) && !NO_COLOR && TERM !== 'dumb'))
}

/** Columns that `text` takes on a terminal: without its colour codes. */
export function visibleWidth(text: string): number {
  return [...stripColors(text)].length
}

/** `text` without colour codes. */
export function stripColors(text: string): string {
  return text.replace(/\u001B\[[\d;]*m/g, '')
}

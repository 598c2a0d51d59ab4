import { readFile } from 'node:fs/promises'

import { type Command, InvalidArgumentError } from 'commander'

import { KintsugiError, type LinearOverride } from '../index.js'

/** Parses the value of an option that is a number. */
export function numberArgument(value: string): number {
  const number = Number(value)
  if (value.trim() === '' || Number.isNaN(number)) throw new InvalidArgumentError('It is not a number.')
  return number
}

/** Parses the value of an option that is a list of numbers. */
export function numbersArgument(value: string): number[] {
  return value.split(',').map(numberArgument)
}

/** Parses `--group-size`. */
export function groupSizeArgument(value: string): number | 'whole' {
  return value === 'whole' ? value : numberArgument(value)
}

/** Parses a number of bytes: plain, or with a unit of 1024 (`K`, `M`, `G`, `T`, with or without `iB`). */
export function bytesArgument(value: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$/i.exec(value.trim())
  if (!match) throw new InvalidArgumentError("It is not a number of bytes, such as 6G or '512 MiB'.")
  return Math.floor(Number(match[1]) * 1024 ** ['', 'K', 'M', 'G', 'T'].indexOf(match[2]!.toUpperCase()))
}

/** Parses `--override PATTERN=BITS[:GROUP]`, which may be given several times. */
export function overrideArgument(value: string, previous: LinearOverride[] | undefined): LinearOverride[] {
  const match = /^(?<linears>.+)=(?<bits>\d+)?(?::(?<group>\w+))?$/.exec(value)
  const { linears, bits, group } = match?.groups ?? {}
  if (linears === undefined || (bits === undefined && group === undefined)) {
    throw new InvalidArgumentError("Give LINEARS=BITS, LINEARS=BITS:GROUP or LINEARS=:GROUP, e.g. '*.down_proj=8:64'.")
  }
  const override: LinearOverride = { linears }
  // The library names what is wrong with the numbers.
  if (bits !== undefined) override.bits = Number(bits) as NonNullable<LinearOverride['bits']>
  if (group !== undefined) override.groupSize = groupSizeArgument(group)
  return [...(previous ?? []), override]
}

/** Parses an option that may be given several times. */
export function listArgument(value: string, previous: string[] | undefined): string[] {
  return [...(previous ?? []), value]
}

/** Adds the options that say how a model runs; `precisions` are those that the command takes. */
export function withModelOptions(command: Command, precisions = 'f32, exact or fast'): Command {
  return command
    .option('--precision <name>', precisions, 'exact')
    .option('--backend <name>', 'cpu, or candle for the plain reference', 'cpu')
}

/** Values of {@link withModelOptions}; the library checks them. */
export interface ModelArguments {
  precision: 'f32' | 'exact' | 'fast'
  backend: 'cpu' | 'candle'
}

/** Reads a UTF-8 text file. */
export async function readText(path: string): Promise<string> {
  let bytes: Buffer
  try {
    bytes = await readFile(path)
  } catch (error) {
    throw unreadable(
      path,
      error instanceof Error ? error.message : String(error),
      'Give the path of a UTF-8 text file.',
    )
  }
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes)
  } catch {
    throw unreadable(path, 'the text is not UTF-8', 'Convert the file to UTF-8.')
  }
}

function unreadable(subject: string, message: string, hint: string): KintsugiError {
  return new KintsugiError({ code: 'ERR_TEXT_UNREADABLE', message, subject, hint })
}

import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import test from 'ava'
import { compress, type CompressOptions } from 'kintsugi'

import { CALIBRATION_TEXT, failsWith, SHORT_CALIBRATION, STORIES, temporaryFolder, TINY } from './fixtures.js'

const { text: _, ...TAKEN } = SHORT_CALIBRATION

/** The weights that a job writes. */
async function weights(out: string, options: Omit<CompressOptions, 'out' | 'dryRun'>): Promise<Buffer> {
  await compress(TINY, { bits: 3, groupSize: 64, ...options, out })
  return readFileSync(join(out, 'model.safetensors'))
}

test('records, tokens and a seed are taken, and named in the report', async (t) => {
  const folder = temporaryFolder(t)
  const records = join(folder, 'records.jsonl')
  const lines = readFileSync(STORIES, 'utf8').slice(0, 20_000).split('\n')
  writeFileSync(records, lines.map((story) => JSON.stringify({ story })).join('\n'))
  const calibration = { file: records, field: 'story', seed: 7, ...TAKEN }
  const report = await compress(TINY, { out: join(folder, 'a'), groupSize: 64, calibration })
  const { length, ...source } = calibration
  const sources = [{ ...source, kind: 'jsonl' as const, holdOut: 0, weight: 1 }]
  t.deepEqual(report.recipe.calibration, { sources, length, subset: false })
  t.is(report.summary.calibrationTokens, TAKEN.sequences * TAKEN.length)

  const ids = join(folder, 'ids.json')
  writeFileSync(ids, JSON.stringify([Array.from({ length: 256 }, (_, i) => (i * 7) % 2000)]))
  const tokens = await compress(TINY, { out: join(folder, 'b'), groupSize: 64, calibration: { file: ids, ...TAKEN } })
  t.is(tokens.recipe.calibration?.sources[0]!.kind, 'tokens')
  t.is(tokens.summary.calibrationTokens, 256)

  writeFileSync(ids, '[[1, 2], [3, 5000]]')
  const outside = { out: join(folder, 'c'), calibration: { file: ids, sequences: 1, length: 2 } }
  const error = await failsWith(t, () => compress(TINY, outside), 'ERR_TEXT_UNREADABLE', /ids\.json/)
  t.regex(error!.message, /5000/)
})

test('statistics that are saved give the same weights without a forward pass', async (t) => {
  const folder = temporaryFolder(t)
  const statistics = join(folder, 'statistics.safetensors')
  const once = { calibration: SHORT_CALIBRATION, saveStatistics: statistics, eora: { rank: 4 } }
  const expected = await weights(join(folder, 'a'), once)
  t.true(existsSync(statistics))
  const again = { calibration: { file: statistics }, eora: { rank: 4 } }
  t.deepEqual(await weights(join(folder, 'b'), again), expected)
  const awq = { out: join(folder, 'c'), method: 'awq', calibration: { file: statistics } } as const
  await failsWith(t, () => compress(TINY, awq), 'ERR_OPTION_INVALID', 'calibration.file')
})

test('texts and statistics are mixed with weights, and the report names their shares', async (t) => {
  const folder = temporaryFolder(t)
  const statistics = join(folder, 'statistics.safetensors')
  await compress(TINY, { out: join(folder, 'a'), calibration: SHORT_CALIBRATION, saveStatistics: statistics })
  const { length, text } = SHORT_CALIBRATION
  const sources = [{ text: CALIBRATION_TEXT, sequences: 3 }, { file: statistics, weight: 0.5 }, { text, sequences: 2 }]
  const mixed = await compress(TINY, { out: join(folder, 'b'), calibration: { sources, length }, eora: { rank: 4 } })
  const kinds = mixed.recipe.calibration!.sources.map(({ kind, sequences, weight }) => [kind, sequences, weight])
  t.deepEqual(kinds, [
    ['text', 3, 1],
    ['statistics', 128, 0.5],
    ['text', 2, 1],
  ])
  const shares = mixed.summary.calibration.map(({ tokens, weight, share }) => [tokens, weight, share])
  t.deepEqual(shares, [
    [3 * length, 1, 3 / 7],
    [4 * length, 0.5, 2 / 7],
    [2 * length, 1, 2 / 7],
  ])
  t.is(mixed.summary.calibrationTokens, 9 * length)
  t.is(mixed.summary.compensation!.holdOut === null, false)
})

test('neither memory nor places change the weights, and too little memory is refused by its parts', async (t) => {
  const folder = temporaryFolder(t)
  const expected = await weights(join(folder, 'a'), { calibration: SHORT_CALIBRATION })
  const calibration = { ...SHORT_CALIBRATION, activations: 'disk' } as const
  t.deepEqual(await weights(join(folder, 'b'), { calibration, memory: 2 ** 30 }), expected)
  const options = { out: join(folder, 'c'), calibration: SHORT_CALIBRATION, memory: 1_000_000 }
  for (const dryRun of [true, false] as const) {
    const error = await failsWith(t, () => compress(TINY, { ...options, dryRun }), 'ERR_MEMORY_EXCEEDED', 'memory')
    t.regex(error!.message, /needs about \d+ MiB, and 1 MiB are there \(base \d+ MiB, .*statistics/)
  }
  t.false(existsSync(options.out))
})

test('calibration names one file', async (t) => {
  const out = join(temporaryFolder(t), 'out')
  for (const calibration of [{}, { text: 'a', file: 'b' }]) {
    await failsWith(t, () => compress(TINY, { out, calibration }), 'ERR_OPTION_INVALID', 'calibration.file')
  }
  const both = { text: 'a', sources: [{ text: 'b' }] }
  await failsWith(t, () => compress(TINY, { out, calibration: both }), 'ERR_OPTION_INVALID', 'calibration.sources')
  const none = { sources: [] }
  await failsWith(t, () => compress(TINY, { out, calibration: none }), 'ERR_OPTION_INVALID', 'calibration.sources')
  const nameless = { sources: [{ text: 'a' }, { weight: 2 }] }
  const subject = 'calibration.sources[1].file'
  await failsWith(t, () => compress(TINY, { out, calibration: nameless }), 'ERR_OPTION_INVALID', subject)
  const weightless = { sources: [{ text: 'a', weight: 0 }] }
  const weight = 'calibration.sources[0].weight'
  await failsWith(t, () => compress(TINY, { out, calibration: weightless }), 'ERR_OPTION_INVALID', weight)
  const missing = { out, calibration: { file: join(out, 'missing.jsonl') } }
  await failsWith(t, () => compress(TINY, missing), 'ERR_TEXT_UNREADABLE', /missing\.jsonl/)
})

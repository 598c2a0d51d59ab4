import test from 'ava'

import { formatBytes, formatCount, formatSeconds, formatShare } from '../../src/cli/format.js'
import { formatPairs, formatTable } from '../../src/cli/table.js'
import { colorsFor, stripColors, visibleWidth } from '../../src/cli/terminal.js'

const PIPE = { write: () => true }

test('columns line up whatever the colours', (t) => {
  const colors = colorsFor({ write: () => true, isTTY: true })
  const table = formatTable(
    [{ title: 'variant' }, { title: 'bits', align: 'right' }],
    [
      [colors.bold('GPTQ'), '2.28'],
      ['original', '16.00'],
    ],
    PIPE,
  )
  t.deepEqual(stripColors(table).split('\n'), [
    'variant    bits',
    '───────────────',
    'GPTQ       2.28',
    'original  16.00',
  ])
})

test('pairs without a value are left out', (t) => {
  t.is(
    formatPairs(
      [
        ['a', '1'],
        ['long', undefined],
        ['bcd', '2'],
      ],
      PIPE,
    ),
    'a    1\nbcd  2',
  )
})

test('visible width leaves colour codes out', (t) => {
  t.is(visibleWidth('\u001B[1m\u001B[33mgold\u001B[39m\u001B[22m'), 4)
})

test('numbers are written for readers', (t) => {
  t.deepEqual([0, 999, 1000, 14_696_792, 262_300, 2.5e12].map(formatBytes), [
    '0 B',
    '999 B',
    '1.00 kB',
    '14.7 MB',
    '262 kB',
    '2.50 TB',
  ])
  t.is(formatCount(7_344_384), '7.34 million')
  t.is(formatCount(999_999), '1.00 million')
  t.deepEqual([0.04, 9.96, 59.4, 59.6, 185, 7800].map(formatSeconds), [
    '0.0 s',
    '10.0 s',
    '59 s',
    '1 min 00 s',
    '3 min 05 s',
    '2 h 10 min',
  ])
  t.is(formatShare(0.1109), '11.1 %')
})

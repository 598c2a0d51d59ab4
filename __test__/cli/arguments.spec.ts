import test from 'ava'

import { calibrationArgument } from '../../src/cli/arguments.js'

test('--calibration takes a file and a weight behind the last equals sign', (t) => {
  const cases: [given: string, file: string, weight?: number][] = [
    ['a.txt', 'a.txt'],
    ['a.txt=3', 'a.txt', 3],
    ['a.txt=0.5', 'a.txt', 0.5],
    ['a.txt=.5', 'a.txt', 0.5],
    ['a.txt=1e-3', 'a.txt', 1e-3],
    ['a.txt=-1', 'a.txt', -1],
    ['a=b.txt', 'a=b.txt'],
    ['a=2=1', 'a=2', 1],
    ['notes=1.2.3', 'notes=1.2.3'],
    ['a.txt=', 'a.txt='],
    ['C:\\texts\\a.txt=0.5', 'C:\\texts\\a.txt', 0.5],
    ['dt=2024/x.jsonl', 'dt=2024/x.jsonl'],
  ]
  for (const [given, file, weight] of cases) {
    t.deepEqual(calibrationArgument(given), [weight === undefined ? { file } : { file, weight }], given)
  }
  const both = calibrationArgument('b.txt=2', calibrationArgument('a.txt'))
  t.deepEqual(both, [{ file: 'a.txt' }, { file: 'b.txt', weight: 2 }])
})

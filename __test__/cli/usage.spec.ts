import { readFileSync } from 'node:fs'
import { join } from 'node:path'

import test from 'ava'

import { ROOT, TINY } from '../fixtures.js'
import { kintsugi } from './command-line.js'

test('--version and --help', async (t) => {
  const { version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8'))
  t.deepEqual(await kintsugi('--version'), { code: 0, stdout: `${version}\n`, stderr: '' })
  const help = await kintsugi('--help')
  t.is(help.code, 0)
  for (const command of ['inspect', 'compress', 'compensate', 'eval', 'generate', 'doctor', 'bench'])
    t.regex(help.stdout, new RegExp(`^  ${command} `, 'm'))
  t.is((await kintsugi('compress', '--help')).code, 0)
})

test('no command prints the help and is wrong usage', async (t) => {
  const { code, stdout, stderr } = await kintsugi()
  t.is(code, 2)
  t.is(stdout, '')
  t.regex(stderr, /Usage: kintsugi/)
})

for (const { args, message, code } of [
  { args: ['insect', TINY], message: /unknown command 'insect'[^]*Did you mean inspect\?/, code: 'ERR_OPTION_UNKNOWN' },
  {
    args: ['inspect', TINY, '--jsn'],
    message: /unknown option '--jsn'[^]*Did you mean --json\?/,
    code: 'ERR_OPTION_UNKNOWN',
  },
  { args: ['inspect'], message: /missing required argument 'path'/, code: 'ERR_OPTION_INVALID' },
  { args: ['compress', TINY], message: /'-o, --out <folder>' not specified/, code: 'ERR_OPTION_INVALID' },
  {
    args: ['compress', TINY, '-o', 'x', '--bits', 'four'],
    message: /--bits[^]*not a number/,
    code: 'ERR_OPTION_INVALID',
  },
  {
    args: ['compress', TINY, '-o', 'x', '--bits', '7'],
    message: /bits must be one of 2, 3, 4, 5, 6, 8/,
    code: 'ERR_OPTION_INVALID',
  },
  {
    args: ['compress', TINY, '-o', 'x', '--memory', 'much'],
    message: /--memory[^]*not a number of bytes/,
    code: 'ERR_OPTION_INVALID',
  },
  { args: ['eval', TINY, '--text', 'x', '--length', '-3'], message: /./, code: 'ERR_TEXT_UNREADABLE' },
]) {
  test(`kintsugi ${args.map((arg) => arg.replace(TINY, 'MODEL')).join(' ')}`, async (t) => {
    const expected = code === 'ERR_TEXT_UNREADABLE' ? 1 : 2
    const plain = await kintsugi(...args)
    t.is(plain.code, expected)
    t.is(plain.stdout, '')
    t.regex(plain.stderr, message)
    t.regex(plain.stderr, new RegExp(`\\[${code}\\]`))
    t.regex(plain.stderr, /try:/)

    const json = await kintsugi(...args, '--json')
    t.is(json.code, expected)
    const { error } = JSON.parse(json.stdout)
    t.is(error.code, code)
    t.deepEqual(Object.keys(error), ['code', 'message', 'subject', 'hint'])
  })
}

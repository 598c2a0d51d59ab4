import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { promisify } from 'node:util'

import test from 'ava'
import { loadModel } from 'kintsugi'

import { createGenerationServer } from '../examples/server.js'
import { ROOT, temporaryFolder, TINY } from './fixtures.js'

const run = promisify(execFile)

function example(name: string, ...args: string[]): Promise<{ stdout: string; stderr: string }> {
  return run(process.execPath, ['--import=tsx', join('examples', name), ...args], { cwd: ROOT })
}

test('quickstart.ts', async (t) => {
  const out = join(temporaryFolder(t), 'w4')
  const { stdout } = await example('quickstart.ts', 'assets/tinystories-656k', 'assets/text/eval-stories.txt', out)
  t.regex(stdout, /\d\.\d\d bits per weight/)
  t.regex(stdout, /Once upon a time.+\n\(40 tokens\)\n$/s)
  t.true(existsSync(join(out, 'eora/adapter_model.safetensors')))
})

test('compensate.ts repairs what was compressed elsewhere', async (t) => {
  const { stdout } = await example('compensate.ts')
  t.regex(stdout, /14 Linears certified to have the best of their rank/)
  const found = [...stdout.matchAll(/^(?:without|rank 4|rank 16): perplexity ([\d.]+)$/gm)].map(([, value]) => Number(value))
  t.is(found.length, 3)
  t.true(found[2]! < found[1]! && found[1]! < found[0]!, found.join(' '))
})

test('merge.ts compares methods', async (t) => {
  t.timeout(180_000)
  const { stdout } = await example('merge.ts')
  for (const method of ['cat', 'svd', 'lego', 'lego-gauge-free', 'ties', 'tsv']) {
    t.regex(stdout, new RegExp(`^${method}: rank \\d+, [\\d.]+ % from the sum, retained \\d+ %, \\d+ %$`, 'm'))
    t.regex(stdout, new RegExp(`^${method}: perplexity \\d+\\.\\d\\d$`, 'm'))
  }
  t.regex(stdout, /^cat: rank 16, 0\.0 % from the sum, retained 100 %, 100 %$/m)
})

test('mend.ts --quick shows every variant, the texts and where the folder is', async (t) => {
  t.timeout(300_000)
  const { stdout } = await example('mend.ts', '--quick')
  for (const variant of ['original', 'RTN', 'GPTQ', 'GPTQ + EoRA 8', 'GPTQ + EoRA 32']) {
    t.regex(
      stdout,
      new RegExp(`^ {2}${variant.replaceAll('+', '\\+')} +\\d+\\.\\d\\d +[\\d.]+ MB +\\d+\\.\\d\\d +\\d+`, 'm'),
    )
  }
  t.regex(stdout, /r·\(m\+k\)·16\/\(m·k\)[^]*4\.0 bits at rank 32[^]*1\.0 bit/)
  t.regex(stdout, /\.demo[/\\]gptq-eora-32/)
  t.true(existsSync(join(ROOT, '.demo/gptq-eora-32/report.json')))
})

test('server.ts streams, refuses wrong requests, and stops when the reader leaves', async (t) => {
  using model = await loadModel(TINY)
  const server = createGenerationServer(model).listen(0, '127.0.0.1')
  t.teardown(() => server.close())
  await once(server, 'listening')
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  const post = (body: unknown, signal?: AbortSignal): Promise<Response> =>
    fetch(`${url}/generate`, { method: 'POST', body: JSON.stringify(body), ...(signal && { signal }) })
  const running = async (): Promise<number> =>
    ((await (await fetch(`${url}/status`)).json()) as { running: number }).running

  const prompt = 'Once upon a time'
  const answer = await post({ prompt, maxTokens: 16 })
  t.is(answer.status, 200)
  t.is(await answer.text(), await model.generate(prompt, { maxTokens: 16 }).text())

  const refused = await post({ prompt, maxTokns: 16 })
  t.is(refused.status, 400)
  t.like(await refused.json(), { error: { code: 'ERR_OPTION_UNKNOWN', subject: 'maxTokns' } })

  const reader = new AbortController()
  const stream = await post({ prompt, maxTokens: 480, ignoreEos: true, temperature: 1 }, reader.signal)
  await stream.body!.getReader().read()
  reader.abort()
  const deadline = performance.now() + 5000
  while ((await running()) > 0) {
    if (performance.now() > deadline) {
      t.fail('the generation goes on without a reader')
      break
    }
  }
  t.is(await running(), 0)
})

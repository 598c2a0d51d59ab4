// Streams generated text over HTTP and stops computing when the reader goes away.
//   node --import=tsx examples/server.ts [CHECKPOINT] [PORT]
//   curl -N localhost:8080/generate -d '{"prompt":"Once upon a time","maxTokens":64}'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import { pathToFileURL } from 'node:url'

import { KintsugiError, loadModel, type Model } from 'kintsugi'

const LARGEST_REQUEST_BYTES = 1 << 20

/** `POST /generate` with `{ prompt, ...options }` streams text; `GET /status` tells how many generations run. */
export function createGenerationServer(model: Model): Server {
  let running = 0

  async function generate(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const disconnected = new AbortController()
    response.on('close', () => disconnected.abort())
    running++
    try {
      const { prompt, ...options } = JSON.parse(await readBody(request))
      for await (const piece of model.generate(prompt, { ...options, signal: disconnected.signal })) {
        if (!response.headersSent) response.writeHead(200, { 'content-type': 'text/plain; charset=utf-8' })
        response.write(piece.text)
      }
      response.end()
    } catch (error) {
      if (disconnected.signal.aborted) return
      if (response.headersSent) {
        response.destroy()
        return
      }
      response.writeHead(400, { 'content-type': 'application/json' })
      response.end(JSON.stringify({ error: error instanceof KintsugiError ? error : String(error) }))
    } finally {
      running--
    }
  }

  return createServer((request, response) => {
    if (request.method === 'POST' && request.url === '/generate') {
      void generate(request, response)
    } else if (request.method === 'GET' && request.url === '/status') {
      response.end(JSON.stringify({ running }))
    } else {
      response.writeHead(404).end()
    }
  })
}

async function readBody(request: IncomingMessage): Promise<string> {
  const chunks: Buffer[] = []
  let bytes = 0
  for await (const chunk of request as AsyncIterable<Buffer>) {
    bytes += chunk.length
    if (bytes > LARGEST_REQUEST_BYTES) throw new Error('the request is too large')
    chunks.push(chunk)
  }
  return Buffer.concat(chunks).toString('utf8')
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const [checkpoint = 'assets/llama-7m', port = '8080'] = process.argv.slice(2)
  const model = await loadModel(checkpoint)
  createGenerationServer(model).listen(Number(port), '127.0.0.1', () => {
    console.log(`${checkpoint} on http://127.0.0.1:${port}/generate`)
  })
}

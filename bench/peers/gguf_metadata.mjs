// Reads the header of a GGUF file with @huggingface/gguf and prints what it found.
//
//     npm install --prefix PEERS @huggingface/gguf@0.4.6
//     PEERS=PEERS node bench/peers/gguf_metadata.mjs FILE.gguf
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'

const peers = createRequire(join(process.env.PEERS ?? process.cwd(), 'package.json'))
const { gguf, GGMLQuantizationType } = await import(pathToFileURL(peers.resolve('@huggingface/gguf')).href)

const { metadata, tensorInfos } = await gguf(process.argv[2], { allowLocalFile: true })
for (const [name, value] of Object.entries(metadata)) {
  const text = Array.isArray(value) ? `${value.length} entries` : String(value)
  console.log(`${name}: ${text.length > 80 ? `${text.slice(0, 80)}…` : text}`)
}
const types = {}
for (const { dtype } of tensorInfos) types[GGMLQuantizationType[dtype]] = (types[GGMLQuantizationType[dtype]] ?? 0) + 1
console.log(`${tensorInfos.length} tensors: ${JSON.stringify(types)}`)

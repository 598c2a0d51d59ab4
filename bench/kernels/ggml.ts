import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'

import koffi from 'koffi'

import type { Candidate, Problem } from './candidate.js'

/** ggml's numbers of its block formats, and whether it interleaves their rows for wide instructions of x86. */
const TYPES = {
  Q4_0: { type: 2, interleaved: true },
  Q8_0: { type: 8, interleaved: false },
  Q4_K: { type: 12, interleaved: true },
} as const
const F32 = 0

export type GgmlType = keyof typeof TYPES

/** The library that ggml would choose for a CPU of that level. */
const LIBRARIES: Record<string, string> = { avx2: 'haswell', avx512vnni: 'icelake' }

const entry = createRequire(import.meta.url).resolve('@node-llama-cpp/linux-x64')
const folder = join(dirname(dirname(entry)), 'bins', 'linux-x64')

koffi.struct('InitParams', { mem_size: 'size_t', mem_buffer: 'void *', no_alloc: 'bool' })
// Symbols must be visible to the library of the CPU level, which ggml opens itself.
const base = koffi.load(join(folder, 'libggml-base.so'), { global: true })
const loader = koffi.load(join(folder, 'libggml.v0.5.0.so'), { global: true })
const { ggml_init, ggml_new_tensor_2d, ggml_mul_mat, ggml_new_graph, ggml_build_forward_expand } = {
  ggml_init: base.func('void *ggml_init(InitParams params)'),
  ggml_new_tensor_2d: base.func('void *ggml_new_tensor_2d(void *context, int type, int64_t columns, int64_t rows)'),
  ggml_mul_mat: base.func('void *ggml_mul_mat(void *context, void *weight, void *x)'),
  ggml_new_graph: base.func('void *ggml_new_graph(void *context)'),
  ggml_build_forward_expand: base.func('void ggml_build_forward_expand(void *graph, void *tensor)'),
}
const row_size = base.func('size_t ggml_row_size(int type, int64_t columns)')
const quantize_chunk = base.func(
  'size_t ggml_quantize_chunk(int type, const float *from, _Out_ uint8_t *to, int64_t start, int64_t rows, int64_t columns, const void *importance)',
)
const alloc_tensors = base.func('void *ggml_backend_alloc_ctx_tensors(void *context, void *backend)')
const alloc_tensors_from = base.func('void *ggml_backend_alloc_ctx_tensors_from_buft(void *context, void *type)')
const tensor_set = base.func('void ggml_backend_tensor_set(void *tensor, const void *data, size_t offset, size_t size)')
const tensor_get = base.func('void ggml_backend_tensor_get(void *tensor, _Out_ void *data, size_t offset, size_t size)')
const graph_compute = base.func('int ggml_backend_graph_compute(void *backend, void *graph)')
const reg_dev_get = base.func('void *ggml_backend_reg_dev_get(void *registry, size_t index)')
const reg_proc = base.func('void *ggml_backend_reg_get_proc_address(void *registry, const char *name)')
const dev_init = base.func('void *ggml_backend_dev_init(void *device, const char *params)')
const buft_name = base.func('const char *ggml_backend_buft_name(void *type)')
const load = loader.func('void *ggml_backend_load(const char *path)')

function context(): unknown {
  return ggml_init({ mem_size: 16 << 20, mem_buffer: null, no_alloc: true })
}

/** ggml's CPU backend with the instructions of a level, on threads of its own. */
export class Ggml {
  readonly #backend: unknown
  /** Where weights are interleaved for wide instructions when they are stored. */
  readonly #repack: unknown

  constructor(level: string, threads: number) {
    const library = LIBRARIES[level]
    if (!library) throw new Error(`ggml has no library for level ${level}`)
    const registry = load(join(folder, `libggml-cpu-${library}.so`))
    if (!registry) throw new Error(`libggml-cpu-${library}.so does not run on this CPU`)
    const device = reg_dev_get(registry, 0)
    this.#backend = dev_init(device, null)
    const proc = (name: string, prototype: string): koffi.KoffiFunction =>
      koffi.decode(reg_proc(registry, name), koffi.proto(prototype)) as unknown as koffi.KoffiFunction
    const setThreads = proc('ggml_backend_set_n_threads', 'void SetThreads(void *backend, int threads)')
    setThreads(this.#backend, threads)
    const extraTypes = proc('ggml_backend_dev_get_extra_bufts', 'void *ExtraTypes(void *device)')
    const types = extraTypes(device)
    for (let i = 0; types && !this.#repack; i++) {
      const type = koffi.decode(types, i * 8, 'void *')
      if (!type) break
      if (buft_name(type) === 'CPU_REPACK') this.#repack = type
    }
  }

  /** Products with matrices in one of ggml's formats, all of them one graph. */
  candidate(name: GgmlType, { N, K, weights, inputs }: Problem): Candidate {
    const { type, interleaved } = TYPES[name]
    const bytes = Number(row_size(type, K)) * N
    const store = context()
    const matrices = weights.map(() => ggml_new_tensor_2d(store, type, K, N))
    if (interleaved && this.#repack) alloc_tensors_from(store, this.#repack)
    else alloc_tensors(store, this.#backend)
    const chunk = new Uint8Array(bytes)
    weights.forEach((weight, i) => {
      if (weight !== weights[i - 1]) quantize_chunk(type, weight, chunk, 0, N, K, null)
      tensor_set(matrices[i], chunk, 0, bytes)
    })
    const graphs = new Map(
      [...inputs].map(([rows, x]) => {
        const scratch = context()
        const input = ggml_new_tensor_2d(scratch, F32, K, rows)
        const graph = ggml_new_graph(scratch)
        const products = matrices.map((matrix) => ggml_mul_mat(scratch, matrix, input))
        products.forEach((product) => ggml_build_forward_expand(graph, product))
        alloc_tensors(scratch, this.#backend)
        tensor_set(input, x, 0, x.byteLength)
        return [rows, { graph, product: products[0] }]
      }),
    )
    const graph = (rows: number): { graph: unknown; product: unknown } => {
      const found = graphs.get(rows)
      if (!found) throw new Error(`no graph for ${rows} rows`)
      return found
    }
    return {
      name: `ggml ${name}`,
      bytes,
      run: (rows) => {
        if (graph_compute(this.#backend, graph(rows).graph) !== 0) throw new Error(`ggml ${name} failed`)
      },
      first: (rows) => {
        graph_compute(this.#backend, graph(rows).graph)
        const y = new Float32Array(rows * N)
        tensor_get(graph(rows).product, y, 0, y.byteLength)
        return y
      },
    }
  }
}

export default {
  files: ['__test__/**/*.spec.ts'],
  extensions: { ts: 'module' },
  nodeArguments: ['--import=tsx'],
  // One process per file: an addon that crashes fails its file and nothing else.
  workerThreads: false,
  // One file at a time: the tests measure event-loop delay and share few cores with the thread pool.
  concurrency: 1,
  timeout: '3m',
}

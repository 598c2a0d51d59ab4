import { getEventListeners } from 'node:events'

import test from 'ava'
import fc from 'fast-check'

import { KintsugiError } from '../src/errors.js'
import { Job, type Progress } from '../src/job.js'

/** Work that does what the test says. */
class FakeWork {
  reading: Progress = { phase: 'start', done: 0, total: 4, unit: '' }
  cancelled = false
  readonly result: Promise<string>
  readonly control = {
    progress: () => ({ ...this.reading }),
    cancel: () => {
      this.cancelled = true
      this.fail('ERR_CANCELLED')
    },
  }
  finish!: (value: string) => void
  #reject!: (error: Error) => void

  constructor() {
    this.result = new Promise((resolve, reject) => {
      this.finish = resolve
      this.#reject = reject
    })
  }

  fail(code: string): void {
    this.#reject(new Error(JSON.stringify({ code, message: 'failed', subject: '', hint: '' })))
  }

  start(signal?: AbortSignal): Job<string> {
    return new Job(() => this, [signal])
  }
}

test('a job gives the result of its work', async (t) => {
  const work = new FakeWork()
  const job = work.start()
  work.finish('done')
  t.is(await job, 'done')
  t.is(await job.then((value) => value.length), 4)
  t.is(await job.finally(() => {}), 'done')
})

test('a job rejects with a typed error', async (t) => {
  const work = new FakeWork()
  const job = work.start()
  work.fail('ERR_TEXT_TOO_SHORT')
  const error = await t.throwsAsync(async () => job, { instanceOf: KintsugiError })
  t.is((error as KintsugiError).code, 'ERR_TEXT_TOO_SHORT')
  t.is(await job.catch(() => 'caught'), 'caught')
})

test('what start throws, the job rejects with', async (t) => {
  const refused = new KintsugiError({ code: 'ERR_OPTION_INVALID', message: 'no' })
  const job = new Job(() => {
    throw refused
  })
  t.is(await t.throwsAsync(async () => job), refused)
})

test('cancel() asks the work to stop', async (t) => {
  const work = new FakeWork()
  const job = work.start()
  job.cancel()
  t.true(work.cancelled)
  const error = await t.throwsAsync(async () => job)
  t.is((error as KintsugiError).code, 'ERR_CANCELLED')
})

test('an abort cancels the work and gives the reason of the signal', async (t) => {
  const work = new FakeWork()
  const controller = new AbortController()
  const job = work.start(controller.signal)
  const reason = new Error('enough')
  controller.abort(reason)
  t.true(work.cancelled)
  t.is(await t.throwsAsync(async () => job), reason)
})

test('a signal that has aborted already stops the work from starting', async (t) => {
  const reason = new Error('too late')
  let started = false
  const job = new Job(() => {
    started = true
    return new FakeWork()
  }, [AbortSignal.abort(reason)])
  t.is(await t.throwsAsync(async () => job), reason)
  t.false(started)
  for await (const _ of job.progress()) t.fail('a job that never started has no progress')
  job.cancel()
})

test('work that finishes although it was aborted keeps its result', async (t) => {
  const controller = new AbortController()
  let finish!: (value: string) => void
  const result = new Promise<string>((resolve) => {
    finish = resolve
  })
  const control = { cancel: () => {}, progress: () => new FakeWork().reading }
  const job = new Job(() => ({ control, result }), [controller.signal])
  controller.abort()
  finish('finished')
  t.is(await job, 'finished')
})

test('a failure that an abort did not cause is not hidden by it', async (t) => {
  const controller = new AbortController()
  const work = new FakeWork()
  work.control.cancel = () => work.fail('ERR_IO')
  const job = work.start(controller.signal)
  controller.abort()
  const error = await t.throwsAsync(async () => job)
  t.is((error as KintsugiError).code, 'ERR_IO')
})

test('no listener stays on the signal', async (t) => {
  const controller = new AbortController()
  for (let i = 0; i < 100; i++) {
    const work = new FakeWork()
    const job = work.start(controller.signal)
    t.is(getEventListeners(controller.signal, 'abort').length, 1)
    if (i % 2) work.finish('done')
    else work.fail('ERR_IO')
    await job.catch(() => {})
  }
  t.is(getEventListeners(controller.signal, 'abort').length, 0)
})

test('progress gives each change once and ends with the job', async (t) => {
  const work = new FakeWork()
  const job = work.start()
  // Polling does not keep a process alive, and this work is no thread that would.
  const alive = setInterval(() => {}, 1000)
  t.teardown(() => clearInterval(alive))
  const seen: string[] = []
  for await (const { phase, done } of job.progress()) {
    seen.push(`${phase} ${done}`)
    if (done < 4) work.reading = { ...work.reading, phase: 'compress', done: done + 1 }
    if (done === 3) work.finish('done')
  }
  t.deepEqual(seen, ['start 0', 'compress 1', 'compress 2', 'compress 3', 'compress 4'])
  t.is(await job, 'done')
})

test('progress alone does not leave a rejection unhandled, and ends', async (t) => {
  const work = new FakeWork()
  const job = work.start()
  const unhandled: unknown[] = []
  const listener = (error: unknown): void => void unhandled.push(error)
  process.on('unhandledRejection', listener)
  setTimeout(() => work.fail('ERR_IO'), 5)
  for await (const _ of job.progress());
  await new Promise((resolve) => setTimeout(resolve, 20))
  process.off('unhandledRejection', listener)
  t.deepEqual(unhandled, [])
})

test('two readers see the progress independently; one may leave early', async (t) => {
  const work = new FakeWork()
  const job = work.start()
  for await (const _ of job.progress()) break
  const rest = (async () => {
    let count = 0
    for await (const _ of job.progress()) count++
    return count
  })()
  work.finish('done')
  t.is(await rest, 1)
})

test('whatever the order of cancel, abort, finish and fail: the job settles once and unfollows', async (t) => {
  const actions = fc.array(fc.constantFrom('cancel', 'abort', 'finish', 'fail', 'read'), { minLength: 1, maxLength: 8 })
  await fc.assert(
    fc.asyncProperty(actions, async (steps) => {
      const work = new FakeWork()
      const controller = new AbortController()
      const job = work.start(controller.signal)
      let settlements = 0
      const settled = job.then(
        () => void settlements++,
        () => void settlements++,
      )
      for (const step of steps) {
        if (step === 'cancel') job.cancel()
        if (step === 'abort') controller.abort()
        if (step === 'finish') work.finish('done')
        if (step === 'fail') work.fail('ERR_IO')
        if (step === 'read') void job.progress().next()
        await Promise.resolve()
      }
      work.finish('done')
      await settled
      for await (const _ of job.progress());
      return settlements === 1 && getEventListeners(controller.signal, 'abort').length === 0
    }),
  )
  t.pass()
})

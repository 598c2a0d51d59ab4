use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::{self, JoinHandle, Thread};

use crate::error::{Error, ErrorCode, Result};

/// Looks at a counter before a thread goes to sleep: about 40 µs, which bridges the pauses between the products of a
/// forward pass.
const SPINS: usize = 2000;

/// The one pool that every product, solver and job of this process shares.
///
/// The count is the number of usable CPUs (cgroup quota and affinity obeyed) or `KINTSUGI_THREADS`. Work is cut
/// into tasks by the caller; which thread runs which task never changes a result.
///
/// The caller takes part: tasks are claimed one by one from a counter, and the caller waits only for tasks that
/// another thread has begun. So several callers may use the pool at once, a task may use it again, and a thread that
/// the system holds up delays no more than its own task, and those that wait for what it makes.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// What workers and callers see.
#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    /// Grows with every call, so that a worker that spins needs no lock.
    calls: AtomicUsize,
}

#[derive(Default)]
struct Queue {
    /// Calls that may have tasks left, oldest first.
    calls: Vec<Arc<Call>>,
    sleeping: usize,
    closed: bool,
}

/// One use of [`ThreadPool::for_each`].
struct Call {
    task: Task,
    count: usize,
    /// The next task that nobody has claimed.
    next: AtomicUsize,
    done: AtomicUsize,
    panicked: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    caller: Thread,
}

/// A borrowed function without its lifetime.
struct Task(*const (dyn Fn(usize) + Sync));

// SAFETY: the function may be called from any thread (`Sync`), and the pointer is only a way to it.
#[allow(unsafe_code, reason = "threads that outlive a call borrow from it")]
unsafe impl Send for Task {}
// SAFETY: as above.
#[allow(unsafe_code, reason = "threads that outlive a call borrow from it")]
unsafe impl Sync for Task {}

impl Call {
    /// Runs tasks until all are claimed.
    fn help(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.count {
                return;
            }
            // SAFETY: the function lives until `for_each` returns, which waits for every claimed task, and this task
            // was claimed before that.
            #[allow(unsafe_code, reason = "threads that outlive a call borrow from it")]
            let task = unsafe { &*self.task.0 };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(index))) {
                self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(panic);
                self.panicked.store(true, Ordering::Relaxed);
            }
            if self.done.fetch_add(1, Ordering::Release) + 1 == self.count {
                self.caller.unpark();
            }
        }
    }

    fn has_tasks(&self) -> bool {
        self.next.load(Ordering::Relaxed) < self.count
    }

    fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire) == self.count
    }

    /// Returns when every task has been done.
    fn wait(&self) {
        for _ in 0..SPINS {
            if self.is_done() {
                return;
            }
            std::hint::spin_loop();
        }
        while !self.is_done() {
            thread::park();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn work(&self) {
        while let Some(call) = self.next_call() {
            call.help();
        }
    }

    /// A call with tasks left; `None` when the pool is closed.
    fn next_call(&self) -> Option<Arc<Call>> {
        let seen = self.calls.load(Ordering::Acquire);
        if let Some(found) = self.find(&self.lock()) {
            return found;
        }
        for _ in 0..SPINS {
            if self.calls.load(Ordering::Acquire) != seen {
                break;
            }
            std::hint::spin_loop();
        }
        let mut queue = self.lock();
        loop {
            if let Some(found) = self.find(&queue) {
                return found;
            }
            queue.sleeping += 1;
            queue = self.work.wait(queue).unwrap_or_else(|poisoned| poisoned.into_inner());
            queue.sleeping -= 1;
        }
    }

    /// `Some(None)` when the pool is closed.
    #[expect(clippy::option_option, reason = "found nothing yet, and never will, are different answers")]
    fn find(&self, queue: &Queue) -> Option<Option<Arc<Call>>> {
        if queue.closed {
            return Some(None);
        }
        queue.calls.iter().find(|call| call.has_tasks()).map(|call| Some(Arc::clone(call)))
    }
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThreadPool").field("threads", &self.threads()).finish()
    }
}

impl ThreadPool {
    /// The shared pool, started at first use.
    pub fn global() -> &'static ThreadPool {
        static POOL: OnceLock<ThreadPool> = OnceLock::new();
        POOL.get_or_init(|| {
            let asked = std::env::var("KINTSUGI_THREADS").ok().and_then(|text| text.trim().parse().ok());
            let available = thread::available_parallelism().map_or(1, usize::from);
            ThreadPool::with_threads(asked.filter(|&threads| threads > 0).unwrap_or(available))
        })
    }

    /// A pool of its own, for tests of thread independence. The caller is one of its threads.
    ///
    /// # Panics
    /// When the operating system refuses to start threads.
    pub fn with_threads(threads: usize) -> Self {
        Self::try_with_threads(threads).unwrap_or_else(|error| panic!("{error}"))
    }

    /// As [`ThreadPool::with_threads`], for numbers that a user gives.
    ///
    /// # Errors
    /// `ERR_IO` when the operating system refuses to start threads; those that it did start have ended by then.
    pub fn try_with_threads(threads: usize) -> Result<Self> {
        Self::start(threads, |index, shared| {
            thread::Builder::new().name(format!("kintsugi-{index}")).spawn(move || shared.work())
        })
    }

    fn start(
        threads: usize,
        mut spawn: impl FnMut(usize, Arc<Shared>) -> std::io::Result<JoinHandle<()>>,
    ) -> Result<Self> {
        let mut pool = ThreadPool { shared: Arc::default(), workers: Vec::new() };
        for index in 1..threads.max(1) {
            // Dropping the pool ends the threads that it has.
            let worker = spawn(index, Arc::clone(&pool.shared)).map_err(|error| {
                Error::new(ErrorCode::Io, format!("thread {} of {threads} cannot be started: {error}", index + 1))
                    .subject("threads")
                    .hint("Ask for fewer threads, or raise the limit of processes of the user or container")
            })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Number of threads that share the work.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0) … task(count - 1)` and returns when all are done. A panic of a task is passed on then.
    pub fn for_each(&self, count: usize, task: impl Fn(usize) + Sync + Send) {
        if count <= 1 || self.workers.is_empty() {
            (0..count).for_each(task);
            return;
        }
        let task: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: only the lifetime changes. The function outlives every use: this call returns, or passes a panic
        // on, only after `wait`.
        #[allow(unsafe_code, reason = "threads that outlive a call borrow from it")]
        let task = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task) };
        let call = Arc::new(Call {
            task: Task(task),
            count,
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            panic: Mutex::new(None),
            caller: thread::current(),
        });
        let sleeping = {
            let mut queue = self.shared.lock();
            queue.calls.push(Arc::clone(&call));
            queue.sleeping
        };
        self.shared.calls.fetch_add(1, Ordering::Release);
        for _ in 0..sleeping.min(count - 1) {
            self.shared.work.notify_one();
        }
        call.help();
        self.shared.lock().calls.retain(|other| !Arc::ptr_eq(other, &call));
        call.wait();
        if call.panicked.load(Ordering::Relaxed)
            && let Some(panic) = call.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take()
        {
            resume_unwind(panic);
        }
    }

    /// Runs `task(i)` for every index and collects the results in order.
    pub fn map<T: Send>(&self, count: usize, task: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
        let mut results: Vec<Option<T>> = (0..count).map(|_| None).collect();
        self.for_each_chunk(&mut results, 1, |index, result| result[0] = Some(task(index)));
        results.into_iter().map(|result| result.expect("every task has run")).collect()
    }

    /// Cuts `data` into chunks of `chunk` elements (the last may be shorter) and runs `task(index, chunk)` on each.
    pub fn for_each_chunk<T: Send>(&self, data: &mut [T], chunk: usize, task: impl Fn(usize, &mut [T]) + Sync + Send) {
        let chunk = chunk.max(1);
        if data.len() <= chunk || self.workers.is_empty() {
            data.chunks_mut(chunk).enumerate().for_each(|(index, part)| task(index, part));
            return;
        }
        // Each is locked once, by the thread that claimed it.
        let parts: Vec<Mutex<&mut [T]>> = data.chunks_mut(chunk).map(Mutex::new).collect();
        self.for_each(parts.len(), |index| {
            task(index, &mut parts[index].lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        });
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.calls.fetch_add(1, Ordering::Release);
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // Panics of tasks are caught; there is nothing to pass on.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn every_chunk_is_visited_once_whatever_the_thread_count() {
        for threads in [1, 2, 3, 7] {
            let pool = ThreadPool::with_threads(threads);
            assert_eq!(pool.threads(), threads);
            for length in [0, 1, 12, 13, 14, 1001] {
                let mut data = vec![0u32; length];
                pool.for_each_chunk(&mut data, 13, |index, part| {
                    for (i, value) in part.iter_mut().enumerate() {
                        *value += (index * 13 + i) as u32;
                    }
                });
                assert!(data.iter().enumerate().all(|(i, &value)| value == i as u32));
            }
            assert_eq!(pool.map(5, |i| i * i), [0, 1, 4, 9, 16]);
            assert_eq!(pool.map(0, |i| i), []);
        }
    }

    #[test]
    fn many_callers_and_tasks_that_call_again_all_come_to_an_end() {
        let pool = ThreadPool::with_threads(3);
        let sum = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..5 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.for_each(7, |i| {
                            pool.for_each(3, |j| {
                                sum.fetch_add((i * 3 + j) as u64, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 5 * 200 * (0..21).sum::<u64>());
    }

    #[test]
    fn a_panic_reaches_the_caller_after_all_tasks_and_leaves_the_pool_usable() {
        for threads in [1, 4] {
            let pool = ThreadPool::with_threads(threads);
            let done = AtomicUsize::new(0);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.for_each(50, |index| {
                    assert!(index != 20, "task twenty");
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }));
            let message = *outcome.unwrap_err().downcast::<&str>().unwrap();
            assert_eq!(message, "task twenty");
            assert!(threads == 1 || done.into_inner() == 49);
            assert_eq!(pool.map(3, |i| i), [0, 1, 2]);
        }
    }

    #[test]
    fn a_thread_that_is_held_up_delays_only_its_own_task() {
        let pool = ThreadPool::with_threads(2);
        let caller = thread::current().id();
        // Whichever thread is not the caller stays in its first task until the caller has done all the others.
        let (by_caller, started) = (AtomicUsize::new(0), Instant::now());
        pool.for_each(100, |_| {
            if thread::current().id() == caller {
                by_caller.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(1));
            } else {
                while by_caller.load(Ordering::Relaxed) < 99 && started.elapsed() < Duration::from_secs(60) {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        assert!(by_caller.into_inner() >= 99);
    }

    #[test]
    fn threads_that_cannot_be_started_are_an_error_and_end_the_others() {
        let (mut seen, ended) = (None, Arc::new(AtomicUsize::new(0)));
        let error = ThreadPool::start(9, |index, shared| {
            if index == 4 {
                return Err(std::io::ErrorKind::WouldBlock.into());
            }
            seen.get_or_insert_with(|| Arc::downgrade(&shared));
            let ended = Arc::clone(&ended);
            Ok(thread::spawn(move || {
                shared.work();
                ended.fetch_add(1, Ordering::Relaxed);
            }))
        })
        .unwrap_err();
        assert_eq!((error.code, error.subject.as_str()), (ErrorCode::Io, "threads"));
        assert!(error.message.starts_with("thread 5 of 9 "), "{}", error.message);
        assert_eq!(ended.load(Ordering::Relaxed), 3);
        assert!(seen.unwrap().upgrade().is_none());
    }

    #[test]
    fn sleeping_workers_wake_up() {
        let pool = ThreadPool::with_threads(2);
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(5));
            let others = AtomicUsize::new(0);
            let caller = thread::current().id();
            pool.for_each(40, |_| {
                if thread::current().id() != caller {
                    others.fetch_add(1, Ordering::Relaxed);
                }
                thread::sleep(Duration::from_millis(1));
            });
            assert!(others.into_inner() > 0);
        }
    }
}

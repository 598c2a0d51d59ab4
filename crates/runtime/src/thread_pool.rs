use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

/// The one pool that every product, solver and job of this process shares.
///
/// The count is the number of usable CPUs (cgroup quota and affinity obeyed) or `KINTSUGI_THREADS`. Work is cut
/// into tasks by the caller; which thread runs which task never changes a result.
pub struct ThreadPool {
    pool: rayon::ThreadPool,
    threads: usize,
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThreadPool").field("threads", &self.threads).finish()
    }
}

impl ThreadPool {
    /// The shared pool, started at first use.
    pub fn global() -> &'static ThreadPool {
        static POOL: OnceLock<ThreadPool> = OnceLock::new();
        POOL.get_or_init(|| {
            let asked = std::env::var("KINTSUGI_THREADS").ok().and_then(|text| text.trim().parse().ok());
            let available = std::thread::available_parallelism().map_or(1, usize::from);
            ThreadPool::with_threads(asked.filter(|&threads| threads > 0).unwrap_or(available))
        })
    }

    /// A pool of its own, for tests of thread independence.
    ///
    /// # Panics
    /// When the operating system refuses to start threads.
    pub fn with_threads(threads: usize) -> Self {
        static SERIAL: AtomicUsize = AtomicUsize::new(0);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|_| format!("kintsugi-{}", SERIAL.fetch_add(1, Ordering::Relaxed)))
            .build()
            .expect("the operating system refused to start the threads of the pool");
        ThreadPool { pool, threads }
    }

    /// Number of threads that share the work.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `task(0) … task(count - 1)` and returns when all are done.
    pub fn for_each(&self, count: usize, task: impl Fn(usize) + Sync + Send) {
        match count {
            0 => {}
            1 => task(0),
            _ => self.pool.install(|| (0..count).into_par_iter().with_max_len(1).for_each(task)),
        }
    }

    /// Runs `task(i)` for every index and collects the results in order.
    pub fn map<T: Send>(&self, count: usize, task: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
        match count {
            0 => Vec::new(),
            1 => vec![task(0)],
            _ => self.pool.install(|| (0..count).into_par_iter().with_max_len(1).map(task).collect()),
        }
    }

    /// Cuts `data` into chunks of `chunk` elements (the last may be shorter) and runs `task(index, chunk)` on each.
    pub fn for_each_chunk<T: Send>(&self, data: &mut [T], chunk: usize, task: impl Fn(usize, &mut [T]) + Sync + Send) {
        let chunk = chunk.max(1);
        if data.len() <= chunk {
            if !data.is_empty() {
                task(0, data);
            }
            return;
        }
        self.pool.install(|| {
            data.par_chunks_mut(chunk).with_max_len(1).enumerate().for_each(|(index, part)| task(index, part));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_is_visited_once_whatever_the_thread_count() {
        for threads in [1, 2, 3, 7] {
            let pool = ThreadPool::with_threads(threads);
            let mut data = vec![0u32; 1001];
            pool.for_each_chunk(&mut data, 13, |index, part| {
                for (i, value) in part.iter_mut().enumerate() {
                    *value += (index * 13 + i) as u32;
                }
            });
            assert!(data.iter().enumerate().all(|(i, &value)| value == i as u32));
            assert_eq!(pool.map(5, |i| i * i), [0, 1, 4, 9, 16]);
        }
    }
}

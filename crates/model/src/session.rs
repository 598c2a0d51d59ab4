use kintsugi_kernels::PAGE_POSITIONS;
use kintsugi_runtime::Result;

use crate::head::HeadBuffers;
use crate::{Backend, Model, Workspace};

/// Hands out KV pages. A page number means the same page in the cache of every block.
#[derive(Debug, Default)]
pub struct PagePool {
    free: Vec<u32>,
    next: u32,
}

impl PagePool {
    /// Lengthens `pages` until `positions` positions fit.
    pub fn extend(&mut self, pages: &mut Vec<u32>, positions: usize) {
        while pages.len() * PAGE_POSITIONS < positions {
            let page = self.free.pop().unwrap_or_else(|| {
                self.next += 1;
                self.next - 1
            });
            pages.push(page);
        }
    }

    /// Takes the pages of a finished sequence back.
    pub fn release(&mut self, pages: &mut Vec<u32>) {
        self.free.append(pages);
    }
}

/// The mutable state of forward passes: caches of every block, buffers, pages. One per stream of requests.
pub struct Session<B: Backend> {
    pub(crate) caches: Vec<B::KvCache>,
    pub(crate) workspace: Workspace<B>,
    pub(crate) hidden: B::Tensor,
    pub(crate) head: HeadBuffers<B>,
    /// The pages of all sequences of this session.
    pub pages: PagePool,
}

impl<B: Backend> Session<B> {
    /// Empty caches and buffers for `model`.
    ///
    /// # Errors
    /// What the backend reports when it cannot allocate.
    pub fn new(model: &Model<B>) -> Result<Self> {
        let (backend, spec) = (model.backend(), model.spec());
        let caches = model.blocks().iter().map(|block| backend.kv_cache(block.attention_shape()));
        Ok(Session {
            caches: caches.collect::<Result<_>>()?,
            workspace: Workspace::new(backend, spec)?,
            hidden: backend.tensor(0, spec.hidden_size)?,
            head: HeadBuffers::new(backend, spec)?,
            pages: PagePool::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_are_used_again() {
        let mut pool = PagePool::default();
        let (mut first, mut second) = (Vec::new(), Vec::new());
        pool.extend(&mut first, PAGE_POSITIONS + 1);
        pool.extend(&mut second, 1);
        assert_eq!((first.clone(), second.clone()), (vec![0, 1], vec![2]));
        pool.release(&mut first);
        pool.extend(&mut second, 3 * PAGE_POSITIONS);
        assert_eq!(second.len(), 3);
        assert!(second.iter().all(|&page| page < 3));
    }
}

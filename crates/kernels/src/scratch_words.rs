use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Words that the thread has had before: taking memory from the system anew for each product would cost as much as a
/// small product. What is in them is not specified.
pub(crate) struct ScratchWords(Vec<u32>);

thread_local! {
    /// The longest words of this thread that are not in use.
    static KEPT: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// Words that a thread keeps; more are given back.
const MOST_KEPT: usize = 4 << 20;

impl ScratchWords {
    /// `len` words.
    pub(crate) fn new(len: usize) -> Self {
        let mut words = KEPT.take();
        words.resize(len, 0);
        ScratchWords(words)
    }
}

impl Drop for ScratchWords {
    fn drop(&mut self) {
        if self.0.capacity() <= MOST_KEPT {
            KEPT.with_borrow_mut(|kept| {
                if kept.capacity() < self.0.capacity() {
                    std::mem::swap(kept, &mut self.0);
                }
            });
        }
    }
}

impl Deref for ScratchWords {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.0
    }
}

impl DerefMut for ScratchWords {
    fn deref_mut(&mut self) -> &mut [u32] {
        &mut self.0
    }
}

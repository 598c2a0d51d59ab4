use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Words that the thread has had before: taking memory from the system anew for each product would cost as much as a
/// small product. What is in them is not specified.
pub(crate) struct ScratchWords {
    /// At least as many as are in use, so that shorter ones in between do not make longer ones be cleared anew.
    words: Vec<u32>,
    len: usize,
}

thread_local! {
    /// Words of this thread that are not in use.
    static KEPT: RefCell<Vec<Vec<u32>>> = const { RefCell::new(Vec::new()) };
}

/// Words that a thread keeps in one piece; longer ones are given back.
const MOST_WORDS: usize = 4 << 20;

/// Pieces that a thread keeps: x for the two parts of a product, for A, and what is packed at a time.
const MOST_PIECES: usize = 4;

impl ScratchWords {
    /// `len` words.
    pub(crate) fn new(len: usize) -> Self {
        let mut words = KEPT.with_borrow_mut(|kept| {
            let fits = (0..kept.len()).filter(|&piece| kept[piece].capacity() >= len);
            let smallest = fits.min_by_key(|&piece| kept[piece].capacity());
            smallest.map(|piece| kept.swap_remove(piece)).unwrap_or_default()
        });
        if words.len() < len {
            words.resize(len, 0);
        }
        ScratchWords { words, len }
    }
}

impl Drop for ScratchWords {
    fn drop(&mut self) {
        if self.words.capacity() > MOST_WORDS {
            return;
        }
        KEPT.with_borrow_mut(|kept| {
            kept.push(std::mem::take(&mut self.words));
            if kept.len() > MOST_PIECES
                && let Some(smallest) = (0..kept.len()).min_by_key(|&piece| kept[piece].capacity())
            {
                kept.swap_remove(smallest);
            }
        });
    }
}

impl Deref for ScratchWords {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.words[..self.len]
    }
}

impl DerefMut for ScratchWords {
    fn deref_mut(&mut self) -> &mut [u32] {
        &mut self.words[..self.len]
    }
}

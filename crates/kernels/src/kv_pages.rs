use std::ops::Range;

use crate::vector::LANES;

/// Positions of a page.
pub const PAGE_POSITIONS: usize = 64;

/// Keys and values of one layer, in pages of [`PAGE_POSITIONS`] positions that segments share out by index.
///
/// In a page each key-value head holds its keys as `[headDim][64]`, so that the scores of 64 positions are computed
/// side by side, then its values as `[64][headDim]`.
pub struct KvPages {
    kv_heads: usize,
    head_dim: usize,
    pages: Vec<Box<[f32]>>,
}

/// Rows of a batch that continue one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionSegment<'a> {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Position of the first row in its sequence.
    pub first_position: usize,
    /// The pages of the sequence: position `p` lives in page `pages[p / 64]`, slot `p % 64`.
    pub pages: &'a [u32],
}

impl KvPages {
    /// No pages yet.
    ///
    /// # Panics
    /// When an argument is zero.
    pub fn new(kv_heads: usize, head_dim: usize) -> Self {
        assert!(kv_heads > 0 && head_dim > 0, "{kv_heads} heads of {head_dim} dimensions hold nothing");
        KvPages { kv_heads, head_dim, pages: Vec::new() }
    }

    /// Grows to at least `pages` pages.
    pub fn reserve(&mut self, pages: usize) {
        let size = self.kv_heads * self.head_floats();
        while self.pages.len() < pages {
            self.pages.push(vec![0.0; size].into_boxed_slice());
        }
    }

    /// Number of pages.
    pub fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// Heads of keys and values.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Dimensions of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bytes of all pages.
    pub fn memory_bytes(&self) -> usize {
        self.pages.len() * self.kv_heads * self.head_floats() * size_of::<f32>()
    }

    /// Floats from the values of a position to those of the next: whole vectors, the rest zero.
    pub(crate) fn value_stride(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// `[headDim][64]`
    pub(crate) fn keys(&self, page: u32, kv_head: usize) -> &[f32] {
        &self.head(page, kv_head)[..self.head_dim * PAGE_POSITIONS]
    }

    /// `[64][value_stride]`
    pub(crate) fn values(&self, page: u32, kv_head: usize) -> &[f32] {
        &self.head(page, kv_head)[self.head_dim * PAGE_POSITIONS..]
    }

    /// Stores the keys and values of the rows of `segment`; both are `[rows, kvHeads · headDim]` of the whole batch.
    pub(crate) fn write(&mut self, segment: &AttentionSegment<'_>, k: &[f32], v: &[f32]) {
        let (head_dim, head_floats, value_stride) = (self.head_dim, self.head_floats(), self.value_stride());
        let width = self.kv_heads * head_dim;
        for (i, row) in segment.rows.clone().enumerate() {
            let position = segment.first_position + i;
            let slot = position % PAGE_POSITIONS;
            let page = &mut self.pages[segment.pages[position / PAGE_POSITIONS] as usize];
            let k = k[row * width..(row + 1) * width].chunks_exact(head_dim);
            let v = v[row * width..(row + 1) * width].chunks_exact(head_dim);
            for ((head, k), v) in page.chunks_exact_mut(head_floats).zip(k).zip(v) {
                let (keys, values) = head.split_at_mut(head_dim * PAGE_POSITIONS);
                for (keys, k) in keys.chunks_exact_mut(PAGE_POSITIONS).zip(k) {
                    keys[slot] = *k;
                }
                values[slot * value_stride..][..head_dim].copy_from_slice(v);
            }
        }
    }

    fn head(&self, page: u32, kv_head: usize) -> &[f32] {
        let floats = self.head_floats();
        &self.pages[page as usize][kv_head * floats..(kv_head + 1) * floats]
    }

    fn head_floats(&self) -> usize {
        PAGE_POSITIONS * (self.head_dim + self.value_stride())
    }
}

impl std::fmt::Debug for KvPages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvPages")
            .field("kv_heads", &self.kv_heads)
            .field("head_dim", &self.head_dim)
            .field("pages", &self.pages.len())
            .finish()
    }
}

impl AttentionSegment<'_> {
    /// Positions that exist once the rows are stored.
    pub(crate) fn positions(&self) -> usize {
        self.first_position + self.rows.len()
    }
}

use std::ops::Range;

/// Consecutive rows of a batch that belong to one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Position of the first row in its sequence; the rows before it are in the KV cache already.
    pub first_position: usize,
    /// KV pages of the sequence: position `p` lives in `pages[p / PAGE_POSITIONS]`.
    pub pages: Vec<u32>,
    /// Positions that the sequence will reach in the end. Some rotary scalings turn by it, so all passes over a
    /// sequence must state the same.
    pub sequence_length: usize,
    /// Index of the adapter that this sequence runs with.
    pub adapter: Option<usize>,
}

/// What one forward pass works on: segments of one or more sequences. A prompt is a batch of one segment, a decode
/// step a batch of one-row segments; a row's result does not depend on what shares its batch.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    segments: Vec<Segment>,
    positions: Vec<u32>,
}

impl Batch {
    /// A batch without rows.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the last `rows` rows of a sequence, or all of it.
    pub fn push(&mut self, rows: usize, first_position: usize, pages: Vec<u32>, adapter: Option<usize>) {
        self.push_part(rows, first_position, pages, adapter, first_position + rows);
    }

    /// Appends `rows` rows of a sequence that will reach `sequence_length` positions.
    pub fn push_part(
        &mut self,
        rows: usize,
        first_position: usize,
        pages: Vec<u32>,
        adapter: Option<usize>,
        sequence_length: usize,
    ) {
        let start = self.positions.len();
        self.positions.extend((first_position..first_position + rows).map(|position| position as u32));
        self.segments.push(Segment { rows: start..start + rows, first_position, pages, sequence_length, adapter });
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.positions.len()
    }

    /// The segments, in row order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Position of each row in its sequence.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// Pages that a cache needs so that every segment fits.
    pub fn pages_needed(&self) -> usize {
        self.segments.iter().flat_map(|segment| &segment.pages).map(|&page| page as usize + 1).max().unwrap_or(0)
    }
}

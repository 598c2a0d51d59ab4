use kintsugi_weights::ElementType;

use crate::vector::{LANES, Level};

/// What stands after the codes of a block in a panel: 32 scales, then 32 zero points or offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GridParameters {
    /// The type that scales are stored in.
    pub(crate) scale_type: ElementType,
    /// What follows the scales.
    pub(crate) origin: GridOrigin,
}

/// Where on the grid zero lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GridOrigin {
    /// At half the range of a code, or where the code table says: nothing follows.
    Centre,
    /// At a code: signed bytes relative to half the range.
    ZeroPoints,
    /// Off the grid: what is added to `(code − half the range) · scale`, as f32.
    Offsets,
}

/// The parameters of a block, in registers.
#[derive(Clone, Copy)]
pub(crate) struct BlockGrid<V> {
    pub(crate) scales: V,
    pub(crate) zero_points: Option<V>,
    pub(crate) offsets: Option<V>,
}

impl<V> BlockGrid<V> {
    /// Each parameter changed in the same way.
    #[inline(always)]
    pub(crate) fn map<W>(self, change: impl Fn(V) -> W) -> BlockGrid<W> {
        BlockGrid {
            scales: change(self.scales),
            zero_points: self.zero_points.map(&change),
            offsets: self.offsets.map(&change),
        }
    }
}

impl GridParameters {
    /// Bytes of the parameters of a block.
    pub(crate) fn bytes(self) -> usize {
        LANES * (self.scale_type.bits() / 8 + self.origin.bytes())
    }

    /// Whether products need the sum of x over each block.
    pub(crate) fn needs_block_sums(self) -> bool {
        self.origin != GridOrigin::Centre
    }

    /// # Safety
    /// `parameters` must point to [`GridParameters::bytes`] bytes.
    #[inline(always)]
    pub(crate) unsafe fn load<L: Level>(self, level: L, parameters: *const u8) -> BlockGrid<L::Vector> {
        // SAFETY: as the caller promises.
        unsafe {
            let scales = match self.scale_type {
                ElementType::F32 => level.f32s(level.load_words(&*parameters.cast())),
                ElementType::F16 => level.load_f16(&*parameters.cast()),
                ElementType::Bf16 => level.load_bf16(&*parameters.cast()),
            };
            let origin = parameters.add(LANES * self.scale_type.bits() / 8);
            let (mut zero_points, mut offsets) = (None, None);
            match self.origin {
                GridOrigin::Centre => {}
                GridOrigin::ZeroPoints => zero_points = Some(level.load_i8(&*origin.cast())),
                GridOrigin::Offsets => offsets = Some(level.f32s(level.load_words(&*origin.cast()))),
            }
            BlockGrid { scales, zero_points, offsets }
        }
    }
}

impl GridOrigin {
    /// Bytes of a row.
    pub(crate) fn bytes(self) -> usize {
        match self {
            GridOrigin::Centre => 0,
            GridOrigin::ZeroPoints => 1,
            GridOrigin::Offsets => 4,
        }
    }
}

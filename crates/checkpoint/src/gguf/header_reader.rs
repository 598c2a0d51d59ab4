use kintsugi_runtime::{Error, ErrorCode, Result};

use crate::ByteSource;

/// Bytes that are read from the source at once.
const WINDOW: usize = 64 << 10;
const DAMAGED: &str = "The file is damaged; download or copy it again";

/// Reads the header of a GGUF file front to back. Every length is checked against what is left of the header before
/// memory is taken.
#[derive(Debug)]
pub(crate) struct HeaderReader<'a> {
    source: &'a dyn ByteSource,
    /// Of the next byte.
    position: u64,
    /// Where the header must have ended.
    end: u64,
    window: Vec<u8>,
    /// Position of the first byte of the window.
    window_start: u64,
}

impl<'a> HeaderReader<'a> {
    /// From the start of `source`, over at most `limit` bytes.
    pub(crate) fn new(source: &'a dyn ByteSource, limit: u64) -> Self {
        HeaderReader { source, position: 0, end: source.length().min(limit), window: Vec::new(), window_start: 0 }
    }

    /// Of the next byte.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// Refuses `count` elements of at least `size` bytes when there are not so many bytes left.
    pub(crate) fn claim(&self, count: u64, size: u64, what: &str) -> Result<()> {
        let left = self.end - self.position;
        match count.checked_mul(size) {
            Some(bytes) if bytes <= left => Ok(()),
            _ => Err(self.corrupt(format!("{what} claims {count} elements, only {left} bytes are left"))),
        }
    }

    /// The next `count` elements of `size` bytes.
    pub(crate) fn bytes(&mut self, count: u64, size: u64, what: &str) -> Result<Vec<u8>> {
        self.claim(count, size, what)?;
        let mut bytes = vec![0; (count * size) as usize];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    /// The next bytes as an array.
    pub(crate) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    pub(crate) fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A text of at most `longest` bytes. Vocabularies hold tokens that are pieces of characters: bytes that are not
    /// UTF-8 are refused here, because byte-level vocabularies spell them in characters and others as `<0xE2>`.
    pub(crate) fn string(&mut self, what: &str, longest: u64) -> Result<String> {
        let length = self.u64(what)?;
        if length > longest {
            return Err(self.corrupt(format!("{what} claims {length} bytes, {longest} are allowed")));
        }
        let bytes = self.bytes(length, 1, what)?;
        String::from_utf8(bytes).map_err(|error| self.corrupt(format!("{what} is not UTF-8: {error}")))
    }

    /// `ERR_CHECKPOINT_CORRUPT` with the name of the source.
    pub(crate) fn corrupt(&self, message: impl Into<String>) -> Error {
        corrupt(self.source, message)
    }

    fn fill(&mut self, mut out: &mut [u8], what: &str) -> Result<()> {
        if out.len() as u64 > self.end - self.position {
            return Err(self.corrupt(format!("the header ends inside of {what}, at byte {}", self.end)));
        }
        while !out.is_empty() {
            let inside = (self.position - self.window_start) as usize;
            if inside >= self.window.len() {
                let length = (self.end - self.position).min(WINDOW as u64) as usize;
                self.window.resize(length, 0);
                self.source.read_exact_at(&mut self.window, self.position)?;
                self.window_start = self.position;
                continue;
            }
            let count = out.len().min(self.window.len() - inside);
            out[..count].copy_from_slice(&self.window[inside..inside + count]);
            out = &mut out[count..];
            self.position += count as u64;
        }
        Ok(())
    }
}

/// `ERR_CHECKPOINT_CORRUPT` with the name of the source.
pub(crate) fn corrupt(source: &dyn ByteSource, message: impl Into<String>) -> Error {
    Error::new(ErrorCode::CheckpointCorrupt, message).subject(source.name()).hint(DAMAGED)
}

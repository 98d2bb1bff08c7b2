//! Frames on a QUIC stream: four bytes of length, little-endian, then so many bytes.

use bytes::{Bytes, BytesMut};

use super::endpoint::LinkError;

/// Bytes asked of a stream at once.
const READ_BYTES: usize = 256 << 10;

/// Memory taken for the stated length of a frame before any of its bytes have come; then as much again as has come.
const TRUSTED: usize = 1 << 20;

/// Bytes that a frame lacks from which on it is worth to look at its length first.
const LARGE: usize = 16 << 10;

impl From<quinn::WriteError> for LinkError {
    fn from(error: quinn::WriteError) -> Self {
        Self::Lost(error.to_string())
    }
}

impl From<quinn::ReadError> for LinkError {
    fn from(error: quinn::ReadError) -> Self {
        Self::Lost(error.to_string())
    }
}

/// Sends frames in order.
pub struct FrameSender(quinn::SendStream);

impl FrameSender {
    pub(super) fn new(stream: quinn::SendStream) -> Self {
        Self(stream)
    }

    /// Streams of higher priority go first where there is not room for all; 0 for ordinary ones.
    pub fn set_priority(&self, priority: i32) {
        // Only fails on a stream that is closed, which the next send will say.
        let _ = self.0.set_priority(priority);
    }

    /// Sends frames that consist of parts, without joining them. Waits for the peer's window.
    ///
    /// # Errors
    /// [`LinkError::Lost`].
    pub async fn send(&mut self, frames: impl IntoIterator<Item = Vec<Bytes>>) -> Result<(), LinkError> {
        let mut chunks = Vec::new();
        for parts in frames {
            let len: usize = parts.iter().map(Bytes::len).sum();
            let len = u32::try_from(len).expect("frames are bounded by their makers");
            chunks.push(Bytes::copy_from_slice(&len.to_le_bytes()));
            chunks.extend(parts.into_iter().filter(|p| !p.is_empty()));
        }
        self.0.write_all_chunks(&mut chunks).await?;
        Ok(())
    }

    /// Nothing more will be sent.
    pub fn finish(&mut self) {
        // Only fails on a stream that is closed already.
        let _ = self.0.finish();
    }
}

/// Receives frames in order.
pub struct FrameReceiver {
    stream: quinn::RecvStream,
    buffer: BytesMut,
    frame_max: usize,
}

impl FrameReceiver {
    pub(super) fn new(stream: quinn::RecvStream, frame_max: usize) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
            frame_max,
        }
    }

    /// Frames may have so many bytes from now on, for example once it is known who sends them.
    pub fn set_frame_max(&mut self, frame_max: usize) {
        self.frame_max = frame_max;
    }

    /// The next frame; `None` at the stream's end.
    ///
    /// # Errors
    /// [`LinkError::Garbage`] for a length over the limit or an end within a frame, [`LinkError::Lost`].
    pub async fn next(&mut self) -> Result<Option<Bytes>, LinkError> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(Some(frame));
            }
            let wanted = self.make_room();
            match self.stream.read_chunk(wanted, true).await? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk.bytes),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(LinkError::Garbage("a frame that ends before its length".into())),
            }
        }
    }

    /// Takes memory for a large frame once, or, if it is larger than [`TRUSTED`], as its parts come. How many bytes to ask for: all
    /// that is there, or what such a frame lacks, so that the next one's begin does not make the buffer grow after all.
    fn make_room(&mut self) -> usize {
        let Some(length) = self.buffer.first_chunk::<4>() else {
            return READ_BYTES;
        };
        let lacks = (4 + u32::from_le_bytes(*length) as usize).saturating_sub(self.buffer.len());
        if lacks < LARGE {
            return READ_BYTES;
        }
        let wanted = lacks.min(TRUSTED.max(self.buffer.len()));
        self.buffer.reserve(wanted);
        wanted
    }

    /// A further frame that has come already.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn take(&mut self) -> Result<Option<Bytes>, LinkError> {
        let Some(length) = self.buffer.first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > self.frame_max {
            return Err(LinkError::Garbage(format!(
                "a frame of {length} bytes where {} are the most",
                self.frame_max
            )));
        }
        if self.buffer.len() < 4 + length {
            return Ok(None);
        }
        let mut frame = self.buffer.split_to(4 + length);
        Ok(Some(frame.split_off(4).freeze()))
    }
}

//! Length-prefixed frames: `length i32 | bytes`, big-endian.

use thiserror::Error;

/// A length that no frame may have.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum FrameError {
    /// Negative, as from a client that does not speak Kafka.
    #[error("a frame cannot have {0} bytes; is this a Kafka client?")]
    Negative(i32),
    /// Above `socket.request.max.bytes`.
    #[error("a frame of {length} bytes is over socket.request.max.bytes ({limit})")]
    TooLarge {
        /// As stated.
        length: usize,
        /// As configured.
        limit: usize,
    },
}

/// Reads the length of the frame that follows.
///
/// # Errors
/// [`FrameError`]; the connection cannot go on then, because where the next frame begins is unknown.
pub fn length(prefix: [u8; 4], limit: usize) -> Result<usize, FrameError> {
    let stated = i32::from_be_bytes(prefix);
    let length = usize::try_from(stated).map_err(|_| FrameError::Negative(stated))?;
    if length > limit {
        return Err(FrameError::TooLarge { length, limit });
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_checked() {
        assert_eq!(length([0, 0, 0, 9], 10), Ok(9));
        assert_eq!(
            length([0, 0, 0, 11], 10),
            Err(FrameError::TooLarge { length: 11, limit: 10 })
        );
        assert_eq!(length([0xff; 4], 10), Err(FrameError::Negative(-1)));
        assert_eq!(
            length(*b"GET ", 100),
            Err(FrameError::TooLarge {
                length: 0x4745_5420,
                limit: 100
            })
        );
    }
}

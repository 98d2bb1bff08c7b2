//! Files that hold one archive: header block, then `length u64 | crc u32 | zero u32 | archive`, in whole blocks.

use std::path::Path;

use rkyv::{Serialize, api::high::HighSerializer, rancor, ser::allocator::ArenaHandle, util::AlignedVec};

use crate::{
    error::StorageError,
    host::{Host, HostFile, OpenMode},
    layout::{BLOCK, FileHeader, FileKind},
    types::align_up,
};

/// Bytes before the archive, behind the header block.
const PREFIX: usize = 16;
/// Bytes written at once; what is large is not copied in one go.
const PIECE: usize = 1 << 20;

/// A value as its archive.
pub struct Packed {
    bytes: AlignedVec,
    crc: u32,
}

impl Packed {
    /// Packs a value.
    ///
    /// # Panics
    /// If it cannot be: nothing that is packed here fails in memory.
    pub fn new(value: &impl for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>) -> Self {
        let bytes = rkyv::to_bytes::<rancor::Error>(value).expect("serialising into memory does not fail");
        let crc = crc32c::crc32c(&bytes);
        Self { bytes, crc }
    }
}

/// Writes an archive's file, and flushes it.
///
/// # Errors
/// Any failure of the disk.
pub async fn store<H: Host>(host: &H, path: &Path, header: FileHeader, archive: &Packed) -> Result<(), StorageError> {
    let file = write(host, path, header, archive).await?;
    file.flush().await.map_err(StorageError::io("flush", path))
}

/// The same without a flush.
///
/// # Errors
/// Any failure of the disk.
pub async fn write<H: Host>(
    host: &H,
    path: &Path,
    header: FileHeader,
    archive: &Packed,
) -> Result<H::File, StorageError> {
    let file = host
        .open(path, OpenMode::Create)
        .await
        .map_err(StorageError::io("create", path))?;
    let mut front = vec![0; BLOCK as usize + PREFIX];
    header.encode(&mut front);
    let (len, crc) = front[BLOCK as usize..].split_at_mut(8);
    len.copy_from_slice(&(archive.bytes.len() as u64).to_le_bytes());
    crc[..4].copy_from_slice(&archive.crc.to_le_bytes());
    let end = align_up((front.len() + archive.bytes.len()) as u64, BLOCK) as usize;
    for at in (0..end).step_by(PIECE) {
        let mut buf = host.buffer(PIECE.min(end - at));
        buf.fill(0);
        overlap(&mut buf, at, &front, 0);
        overlap(&mut buf, at, &archive.bytes, front.len());
        file.write_at(buf, at as u64)
            .await
            .map_err(StorageError::io("write", path))?;
    }
    file.truncate(end as u64)
        .await
        .map_err(StorageError::io("truncate", path))?;
    Ok(file)
}

/// Copies what of `part`, which stands at `place` of the file, falls into the piece that begins `at`.
fn overlap(piece: &mut [u8], at: usize, part: &[u8], place: usize) {
    let from = at.max(place);
    let to = (at + piece.len()).min(place + part.len());
    if from < to {
        piece[from - at..to - at].copy_from_slice(&part[from - place..to - place]);
    }
}

/// Reads an archive's file; `None` if it is not there.
///
/// # Errors
/// [`StorageError::Corrupt`] if length or checksum fail, [`StorageError::Incompatible`] for another format.
pub async fn load<H: Host>(host: &H, path: &Path, kind: FileKind) -> Result<Option<AlignedVec>, StorageError> {
    let file = match host.open(path, OpenMode::Existing).await {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(StorageError::io("open", path)(e)),
    };
    let len = file.size().await.map_err(StorageError::io("stat", path))?;
    let bytes = file
        .read_at(0, len as usize)
        .await
        .map_err(StorageError::io("read", path))?;
    FileHeader::decode(&bytes, kind, path)?;
    let corrupt = |reason: &str| StorageError::Corrupt {
        path: path.to_owned(),
        position: BLOCK,
        reason: reason.into(),
    };
    let at = BLOCK as usize;
    let prefix = bytes.get(at..at + PREFIX).ok_or_else(|| corrupt("too short"))?;
    let (len, crc) = prefix.split_at(8);
    let len = u64::from_le_bytes(len.try_into().expect("split at 8"));
    let archive = usize::try_from(len)
        .ok()
        .and_then(|len| bytes.get(at + PREFIX..(at + PREFIX).checked_add(len)?))
        .ok_or_else(|| corrupt("stated length is beyond the file"))?;
    if crc[..4] != crc32c::crc32c(archive).to_le_bytes() {
        return Err(corrupt("checksum"));
    }
    let mut aligned = AlignedVec::new();
    aligned.extend_from_slice(archive);
    Ok(Some(aligned))
}

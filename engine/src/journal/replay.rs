//! Reading a journal back after a crash.
//!
//! Groups are followed from the checkpoint's position until one does not check out. What lies there is then told
//! apart: if any later group says that this position was flushed, it is corruption of acknowledged data and
//! the start fails with the file and the byte; otherwise it is the torn tail of the last write, and is left out.

use std::{collections::BTreeMap, path::Path};

use bytes::Bytes;

use crate::{
    batch::{self, Batch, BatchHeader, RecordKind},
    error::StorageError,
    host::{Host, HostFile, OpenMode},
    journal::{
        Position,
        format::{self, GroupHeader},
        parse_slot_name, slot_path,
    },
    layout::{BLOCK, FileHeader, FileKind},
    salvage::Damage,
    types::align_up,
};

/// What a journal held.
#[derive(Debug, Default)]
pub struct Replay {
    /// Records from the checkpoint on, in order.
    pub records: Vec<Batch>,
    /// Where a torn tail was left out.
    pub torn_at: Option<(std::path::PathBuf, u64)>,
}

struct Slot {
    path: std::path::PathBuf,
    bytes: Bytes,
}

/// Every group header that stands where it says, stale ones of an earlier use of the file included.
fn headers(slot: &Slot) -> impl Iterator<Item = GroupHeader> {
    (BLOCK..slot.bytes.len() as u64)
        .step_by(BLOCK as usize)
        .filter_map(|at| GroupHeader::decode(&slot.bytes[at as usize..]).filter(|h| h.position.offset == at))
}

/// Reads the groups that `shard` wrote in `incarnation` at or after `from`.
///
/// # Errors
/// [`StorageError::Corrupt`] for damage of what was flushed; any failure of the disk.
pub async fn replay<H: Host>(
    host: &H,
    dir: &Path,
    shard: u32,
    incarnation: u64,
    from: Position,
) -> Result<Replay, StorageError> {
    let slots = read_slots(host, dir, &format!("{shard:04}-")).await?;
    for slot in &slots {
        FileHeader::decode(&slot.bytes, FileKind::Journal, &slot.path)?;
    }
    let mut by_seq: BTreeMap<u64, &Slot> = BTreeMap::new();
    // Every header in every block, in order of position: what later groups say of earlier ones.
    let mut claims: BTreeMap<Position, Position> = BTreeMap::new();
    for slot in &slots {
        for header in headers(slot).filter(|h| h.incarnation == incarnation && h.shard == shard) {
            claims.insert(header.position, header.flushed);
            by_seq.insert(header.position.seq, slot);
        }
    }
    // A file in use may hold stale groups of an earlier use behind its newest ones; by_seq then names the file
    // for both sequence numbers, and the earlier one fails its position check below.
    let mut out = Replay::default();
    let mut next = from;
    if next.offset < BLOCK {
        next = Position {
            seq: next.seq.max(1),
            offset: BLOCK,
        };
    }
    while let Some(slot) = by_seq.get(&next.seq) {
        match read_group(slot, next, incarnation, shard)? {
            Some((records, end)) => {
                out.records.extend(records);
                next.offset = end;
            }
            None => {
                // The rest of the file did not suffice for the group that came next.
                let following = Position {
                    seq: next.seq + 1,
                    offset: BLOCK,
                };
                // A file is flushed before the next one is begun, so the first group there says where it ended.
                if claims.get(&following).is_none_or(|flushed| *flushed != next) {
                    break;
                }
                next = following;
            }
        }
    }
    if let Some((&later, _)) = claims.range(next..).find(|(_, flushed)| **flushed > next) {
        let slot = by_seq
            .get(&next.seq)
            .or_else(|| by_seq.get(&later.seq))
            .expect("the claim came from a file");
        return Err(corrupt(slot, next, later));
    }
    if let Some(slot) = by_seq.get(&next.seq)
        && (next.offset as usize) < slot.bytes.len()
        && claims.range(next..).next().is_some()
    {
        out.torn_at = Some((slot.path.clone(), next.offset));
    }
    Ok(out)
}

fn corrupt(slot: &Slot, at: Position, witness: Position) -> StorageError {
    StorageError::Corrupt {
        path: slot.path.clone(),
        position: at.offset,
        reason: format!(
            "journal group {}:{} does not check out although group {}:{} was written after it was flushed; \
             acknowledged records may be damaged: restore the folder from a copy, or empty this journal file to go \
             on with what the segments hold",
            at.seq, at.offset, witness.seq, witness.offset
        ),
    }
}

/// Looks whether all files of a shard's journal are there, as far as that can be told: they are made one after the other, the first
/// one before anything is acknowledged. Without any at all `must_exist` says whether there must be one.
///
/// # Errors
/// [`StorageError::Missing`]; any failure of the disk.
pub fn check_files<H: Host>(host: &H, dir: &Path, shard: u32, must_exist: bool) -> Result<(), StorageError> {
    let names = host.list(dir).map_err(StorageError::io("list", dir))?;
    let last = (names.iter().filter_map(|name| parse_slot_name(name)))
        .filter_map(|(of, slot)| (of == shard).then_some(slot))
        .max();
    let last = match last {
        Some(last) => last,
        None if must_exist => 0,
        None => return Ok(()),
    };
    for slot in 0..=last {
        let path = slot_path(dir, shard, slot);
        let is_there = (path.file_name().and_then(|n| n.to_str())).is_some_and(|n| names.iter().any(|name| name == n));
        if !is_there {
            return Err(StorageError::Missing {
                path,
                reason: "records that were acknowledged may have been in it alone: restore the folder from a copy, or, if other nodes of a \
                         cluster have what it had, empty the folder; to go on with what the segments hold make an empty file of that name"
                    .into(),
            });
        }
    }
    Ok(())
}

/// Gives the disk back what journal files take that hold nothing that a replay from `from` on needs. The first file, which the next
/// start needs, stays, and so do all names. Returns how many were emptied.
///
/// # Errors
/// Any failure of the disk.
pub async fn empty_unneeded<H: Host>(
    host: &H,
    dir: &Path,
    shard: u32,
    incarnation: u64,
    from: Position,
) -> Result<usize, StorageError> {
    let mut emptied = 0;
    let first = slot_path(dir, shard, 0);
    for slot in read_slots(host, dir, &format!("{shard:04}-")).await? {
        let is_needed = headers(&slot).any(|h| h.incarnation == incarnation && h.shard == shard && h.position >= from);
        if is_needed || slot.path == first {
            continue;
        }
        let path = &slot.path;
        let file = (host.open(path, OpenMode::Existing).await).map_err(StorageError::io("open", path))?;
        file.truncate(0).await.map_err(StorageError::io("truncate", path))?;
        file.flush().await.map_err(StorageError::io("flush", path))?;
        emptied += 1;
    }
    Ok(emptied)
}

/// What damaged journals still hold.
#[derive(Debug, Default)]
pub struct Salvaged {
    /// Records of every group that checks out, of the latest incarnation, in no order.
    pub records: Vec<Batch>,
    /// Files and groups that do not.
    pub damage: Vec<Damage>,
}

/// Reads every sound group of the latest incarnation, of all shards, whatever stands between them.
///
/// # Errors
/// Any failure of the disk.
pub async fn salvage<H: Host>(host: &H, dir: &Path) -> Result<Salvaged, StorageError> {
    let mut out = Salvaged::default();
    let slots = read_slots(host, dir, "").await?;
    let latest = slots.iter().flat_map(headers).map(|h| h.incarnation).max();
    for slot in &slots {
        for header in headers(slot).filter(|h| Some(h.incarnation) == latest) {
            match read_group(slot, header.position, header.incarnation, header.shard) {
                Ok(Some((records, _))) => out.records.extend(records),
                // Groups of an earlier use of the file, written over in part, look the same.
                Ok(None) => {}
                Err(StorageError::Corrupt { path, position, reason }) => {
                    out.damage.push(Damage::Bytes { path, position, reason });
                }
                Err(other) => return Err(other),
            }
        }
    }
    Ok(out)
}

/// Journal files whose names begin so.
async fn read_slots<H: Host>(host: &H, dir: &Path, prefix: &str) -> Result<Vec<Slot>, StorageError> {
    let mut slots = Vec::new();
    for name in host.list(dir).map_err(StorageError::io("list", dir))? {
        if !(name.starts_with(prefix) && name.ends_with(".journal")) {
            continue;
        }
        let path = dir.join(name);
        let file = host
            .open(&path, OpenMode::Existing)
            .await
            .map_err(StorageError::io("open", &path))?;
        let len = file.size().await.map_err(StorageError::io("stat", &path))?;
        let bytes = file
            .read_at(0, len as usize)
            .await
            .map_err(StorageError::io("read", &path))?;
        // A file whose prewriting was cut short never held a group.
        if bytes.len() as u64 >= BLOCK && bytes[..8] != [0; 8] {
            slots.push(Slot {
                path,
                bytes: bytes.into(),
            });
        }
    }
    Ok(slots)
}

/// The records of the group at `at` and the offset behind it; `None` if there is none that checks out.
fn read_group(
    slot: &Slot,
    at: Position,
    incarnation: u64,
    shard: u32,
) -> Result<Option<(Vec<Batch>, u64)>, StorageError> {
    let start = at.offset as usize;
    let Some(header) = slot.bytes.get(start..).and_then(GroupHeader::decode) else {
        return Ok(None);
    };
    if header.position != at || header.incarnation != incarnation || header.shard != shard {
        return Ok(None);
    }
    let body_start = start + format::HEADER_LEN;
    let Some(body) = body_start
        .checked_add(header.body_len as usize)
        .filter(|end| *end <= slot.bytes.len())
        .map(|end| slot.bytes.slice(body_start..end))
    else {
        return Ok(None);
    };
    if crc32c::crc32c(&body) != header.body_crc {
        return Ok(None);
    }
    let mut records = Vec::new();
    let mut pos = 0;
    while pos < body.len() {
        let record = read_record(&body, pos).ok_or_else(|| StorageError::Corrupt {
            path: slot.path.clone(),
            position: (body_start + pos) as u64,
            reason: "a journal record does not decode although its group's checksum holds".into(),
        })?;
        pos += record.header.journal_len() as usize;
        records.push(record);
    }
    Ok(Some((
        records,
        at.offset + align_up(format::HEADER_LEN as u64 + body.len() as u64, BLOCK),
    )))
}

fn read_record(body: &Bytes, pos: usize) -> Option<Batch> {
    let head = body.get(pos..)?.first_chunk::<{ batch::HEADER_LEN }>()?;
    let header = BatchHeader::decode(head).ok()?;
    let payload = if header.kind == RecordKind::Batch {
        let start = pos + batch::HEADER_LEN;
        let end = start.checked_add(header.payload_len as usize)?;
        (end <= body.len()).then(|| body.slice(start..end))?
    } else {
        Bytes::new()
    };
    Some(Batch { header, payload })
}

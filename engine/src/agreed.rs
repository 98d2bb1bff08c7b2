//! What the replicas of a partition had agreed on, noted now and then. A replica that leads after a restart learns the high
//! watermark from the others; where too few of them are in sync it could not, and records that all had acknowledged long ago
//! would be there and not be read.
//!
//! A note is a lower bound, and it is believed of a log only if that is still the one it was made of: what stands before an
//! offset follows from the epoch that it ends in (KIP-101). Nothing is lost with a note, so notes are not flushed.
//! Kafka's are called `replication-offset-checkpoint`.

// A length or count that is stored or sent must not wrap.
#![cfg_attr(not(test), warn(clippy::cast_possible_truncation))]

use std::path::Path;

use rkyv::{Archive, Deserialize, Serialize, rancor};
use uuid::Uuid;

use crate::{
    archive::{self, Packed},
    error::StorageError,
    host::Host,
    layout::{FileHeader, FileKind},
    log::EpochCache,
    types::{LeaderEpoch, Offset, PartitionKey, PartitionMap},
};

/// A high watermark, and the epoch of the last record below it.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Agreed {
    // First, for the order: of two notes the one that ends in a later epoch is the later one.
    epoch: LeaderEpoch,
    offset: Offset,
}

impl Agreed {
    /// A note of a log's high watermark; `None` if the log has nothing below it.
    #[must_use]
    pub fn of(high_watermark: Offset, epochs: &EpochCache) -> Option<Self> {
        let epoch = epochs.epoch_of(high_watermark - 1)?;
        Some(Self {
            epoch,
            offset: high_watermark,
        })
    }

    /// The offset below which a log that ends at `log_end` holds what was agreed on; `None` if that cannot be said: it is another
    /// log by now.
    #[must_use]
    pub fn recall(&self, epochs: &EpochCache, log_end: Offset) -> Option<Offset> {
        // A crash may have taken its end, where it was not flushed.
        let end = self.offset.min(log_end);
        (epochs.epoch_of(end.checked_sub(1)?) == Some(self.epoch)).then_some(end)
    }

    /// The note to keep of a log of which `before` was noted: that of its high watermark now, or the one before if that says more.
    #[must_use]
    pub fn renewed(before: Option<Self>, high_watermark: Offset, epochs: &EpochCache, log_end: Offset) -> Option<Self> {
        let before = before.filter(|b| b.recall(epochs, log_end).is_some());
        Self::of(high_watermark, epochs).max(before)
    }
}

/// A note as it stands in a file.
#[derive(Archive, Serialize, Deserialize)]
struct Noted {
    topic: [u8; 16],
    partition: u32,
    agreed: Agreed,
}

/// Writes a shard's notes in place of those before. A crash of the host may lose them.
///
/// # Errors
/// Any failure of the disk; those before are then still there.
pub async fn store<H: Host>(
    host: &H,
    dir: &Path,
    shard: u32,
    notes: &PartitionMap<Agreed>,
) -> Result<(), StorageError> {
    host.create_dir(dir).await.map_err(StorageError::io("create", dir))?;
    let noted: Vec<Noted> = (notes.iter())
        .map(|(key, agreed)| Noted {
            topic: key.topic.into_bytes(),
            partition: key.partition,
            agreed: *agreed,
        })
        .collect();
    let header = FileHeader {
        kind: FileKind::Agreed,
        topic: Uuid::nil(),
        number: shard,
        base: 0,
    };
    let path = dir.join(format!("{shard:04}.agreed"));
    let temporary = dir.join(format!("{shard:04}.agreed.new"));
    archive::write(host, &temporary, header, &Packed::new(&noted)).await?;
    host.rename(&temporary, &path)
        .map_err(StorageError::io("rename", &temporary))
}

/// Reads the notes of all shards that ever made any; the latest of each partition. A file that does not check out is left out.
///
/// # Errors
/// The folder cannot be listed.
pub async fn load<H: Host>(host: &H, dir: &Path) -> Result<PartitionMap<Agreed>, StorageError> {
    let mut notes = PartitionMap::default();
    for name in host.list(dir).map_err(StorageError::io("list", dir))? {
        if !name.ends_with(".agreed") {
            continue;
        }
        let path = dir.join(&name);
        let noted = match read(host, &path).await {
            Ok(noted) => noted,
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "notes of what replicas agreed on are of no use and are left out");
                continue;
            }
        };
        for Noted {
            topic,
            partition,
            agreed,
        } in noted
        {
            let key = PartitionKey {
                topic: Uuid::from_bytes(topic),
                partition,
            };
            let latest = notes.entry(key).or_insert(agreed);
            *latest = agreed.max(*latest);
        }
    }
    Ok(notes)
}

async fn read<H: Host>(host: &H, path: &Path) -> Result<Vec<Noted>, StorageError> {
    let Some(archive) = archive::load(host, path, FileKind::Agreed).await? else {
        return Ok(Vec::new());
    };
    rkyv::from_bytes::<Vec<Noted>, rancor::Error>(&archive).map_err(|e| StorageError::Corrupt {
        path: path.to_owned(),
        position: 0,
        reason: e.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::sim::SimHost;

    fn epochs(starts: &[(LeaderEpoch, Offset)]) -> EpochCache {
        let mut cache = EpochCache::default();
        starts.iter().for_each(|(epoch, start)| cache.note(*epoch, *start));
        cache
    }

    #[test]
    fn a_note_is_believed_of_the_same_log_only() {
        let log = epochs(&[(1, 0), (3, 10)]);
        assert_eq!(Agreed::of(0, &log), None);
        let note = Agreed::of(15, &log).expect("there are records below");
        assert_eq!(note.recall(&log, 15), Some(15));
        assert_eq!(note.recall(&epochs(&[(1, 0), (3, 10), (4, 20)]), 30), Some(15));
        assert_eq!(note.recall(&log, 12), Some(12), "it has lost its end");
        assert_eq!(
            note.recall(&epochs(&[(1, 0)]), 8),
            None,
            "it has lost more than can be said"
        );
        assert_eq!(
            note.recall(&epochs(&[(1, 0), (4, 10)]), 30),
            None,
            "it was cut, and went on under another leader"
        );
        assert_eq!(note.recall(&epochs(&[]), 0), None);
    }

    #[test]
    fn the_note_that_says_more_of_the_log_stays() {
        let log = epochs(&[(1, 0), (3, 10)]);
        let (early, late) = (Agreed::of(5, &log), Agreed::of(12, &log));
        assert_eq!(Agreed::renewed(late, 5, &log, 20), late);
        assert_eq!(Agreed::renewed(early, 12, &log, 20), late);
        assert_eq!(Agreed::renewed(early, 0, &log, 20), early);
        // An election that was not clean: what was agreed on is gone.
        let other = epochs(&[(1, 0), (4, 7)]);
        assert_eq!(Agreed::renewed(late, 5, &other, 20), early);
    }

    #[test]
    fn the_latest_note_counts_whichever_shard_made_it() {
        let key = |partition| PartitionKey {
            topic: Uuid::from_u128(7),
            partition,
        };
        let note = |offset, epoch| Agreed { epoch, offset };
        let dir = Path::new("/data/agreed");
        let host = SimHost::new();
        let stored = host.run(async {
            let first = [(key(0), note(100, 2)), (key(1), note(5, 1))].into_iter().collect();
            store(&host, dir, 0, &first).await?;
            let second = [(key(0), note(60, 3)), (key(2), note(9, 9))].into_iter().collect();
            store(&host, dir, 1, &second).await?;
            store(&host, dir, 2, &PartitionMap::default()).await?;
            load(&host, dir).await
        });
        let stored = stored.expect("nothing cuts the run").expect("a disk without faults");
        let all = [(key(0), note(60, 3)), (key(1), note(5, 1)), (key(2), note(9, 9))];
        assert_eq!(stored, all.into_iter().collect());
    }
}

//! From what a stopped or killed broker left to partitions ready for appends.
//!
//! 1. The latest incarnation's checkpoints say what the segments hold.
//! 2. Its journals, all shards', are replayed from there: every batch goes to the place in its segment that it was
//!    given when it was appended.
//! 3. A base checkpoint of the next incarnation is stored; from then on the old journals mean nothing.
//!
//! Sealed segments are not read, so the time depends on the journals' size alone. Partitions are handed over
//! without regard to the shards that had them, so the number of cores may change between starts.
//! A crash during recovery leaves the old checkpoints and journals as they were: it begins again.
//!
//! | journal record | log end of its partition | what is done |
//! |---|---|---|
//! | batch or extent, last offset below the log end | – | skipped: in the segments already |
//! | batch, first offset = log end | – | written to its place |
//! | extent, first offset = log end | – | taken in: its payload was flushed before the record |
//! | batch or extent, first offset beyond the log end | – | waits for what comes before it; if that does not come, an acknowledged batch is missing: corruption |
//! | the same, of a partition that the shard's checkpoint does not know, or knows as empty | – | left out: the partition had left the shard |
//! | log start | – | the log start moves, never back but by a restart further on |
//! | truncate, restart | – | the log is cut; batches read before that and cut are not written |

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use crate::{
    batch::{Batch, BatchHeader, RecordKind},
    checkpoint::{self, Captured, Name},
    error::StorageError,
    host::{Host, HostFile},
    journal::{
        Position,
        replay::{self, Replay},
    },
    log::{Cut, LogState},
    segment::{self, FileCache, Missing, segment_path},
    shard::ShardConfig,
    sync::concurrently,
    types::{Offset, PartitionKey},
};

/// Partitions written side by side.
const PARTITIONS_AT_ONCE: usize = 16;

/// What recovery hands over.
#[derive(Debug)]
pub struct Recovered {
    /// The incarnation to run as.
    pub incarnation: u64,
    /// Every partition found.
    pub partitions: Vec<LogState>,
    /// Batches replayed from journals.
    pub replayed: u64,
    /// The shards whose checkpoints had them last, if there were as many shards as there are to be.
    pub homes: BTreeMap<PartitionKey, u32>,
    /// Torn tails that were left out, as file and byte.
    pub torn: Vec<(std::path::PathBuf, u64)>,
}

/// Recovers a data folder; an empty one gives nothing, as incarnation 1.
///
/// # Errors
/// [`StorageError::Corrupt`] if acknowledged records are damaged or missing, [`StorageError::Missing`] if a part of the folder is gone,
/// [`StorageError::Incompatible`] for files of another format, and any failure of the disk.
pub async fn recover<H: Host>(host: &H, config: &ShardConfig, shards: u32) -> Result<Recovered, StorageError> {
    match recover_once(host, config, shards).await {
        // Whoever cannot start cannot delete anything either.
        Err(error) if error.is_disk_full() && make_room(host, config).await? > 0 => {
            tracing::warn!(%error, "the disk is full: journal files that hold nothing any more are emptied");
            recover_once(host, config, shards).await
        }
        other => other,
    }
}

/// Fails unless all is there that every folder has from which a broker has served.
///
/// # Errors
/// [`StorageError::Missing`]; any failure of the disk.
pub fn check_served<H: Host>(host: &H, config: &ShardConfig) -> Result<(), StorageError> {
    if !checkpoint::is_there(host, &config.checkpoint_dir())? {
        return Err(without_checkpoint(config));
    }
    replay::check_files(host, &config.journal_dir(), 0, true)
}

fn without_checkpoint(config: &ShardConfig) -> StorageError {
    StorageError::Missing {
        path: config.checkpoint_dir(),
        reason: "it has no base checkpoint, which says what the segments and journals hold: restore the folder from a copy, or save what is \
                 left with `millrace export`; if other nodes of a cluster have what it had, empty the folder"
            .into(),
    }
}

/// Makes room for a start on a full disk; returns how many files were emptied.
async fn make_room<H: Host>(host: &H, config: &ShardConfig) -> Result<usize, StorageError> {
    let found = checkpoint::load(host, &config.checkpoint_dir()).await?;
    let mut emptied = 0;
    for (shard, from) in replay_from(&found) {
        emptied += replay::empty_unneeded(host, &config.journal_dir(), shard, found.incarnation, from).await?;
    }
    Ok(emptied)
}

/// The shards of the latest incarnation, and where replay of their journals begins.
fn replay_from(found: &checkpoint::Found) -> BTreeMap<u32, Position> {
    let all = (0..found.base.shards).map(|shard| (shard, Position::START));
    let noted = found
        .shards
        .iter()
        .map(|(shard, checkpoint)| (*shard, checkpoint.replay_from()));
    all.chain(noted).collect()
}

async fn recover_once<H: Host>(host: &H, config: &ShardConfig, shards: u32) -> Result<Recovered, StorageError> {
    // What is made in them is made durable there; their own names are here.
    for dir in [config.checkpoint_dir(), config.journal_dir(), config.logs_dir()] {
        host.create_dir(&dir).await.map_err(StorageError::io("create", &dir))?;
    }
    (host.sync_dir(&config.dir).await).map_err(StorageError::io("sync", &config.dir))?;
    let found = checkpoint::load(host, &config.checkpoint_dir()).await?;
    let replay_from = replay_from(&found);
    let lists = |dir: &Path| host.list(dir).map_err(StorageError::io("list", dir));
    if found.incarnation == 0 && !(lists(&config.journal_dir())?.is_empty() && lists(&config.logs_dir())?.is_empty()) {
        return Err(without_checkpoint(config));
    }
    for shard in replay_from.keys() {
        let has_checkpointed = found.shards.iter().any(|(s, _)| s == shard);
        replay::check_files(host, &config.journal_dir(), *shard, has_checkpointed)?;
    }
    let mut logs: BTreeMap<PartitionKey, LogState> = BTreeMap::new();
    for partition in found.base.partitions {
        logs.insert(partition.key(), partition.restore());
    }
    let mut homes = BTreeMap::new();
    let mut known: BTreeMap<u32, BTreeSet<PartitionKey>> = BTreeMap::new();
    for (shard, checkpoint) in found.shards {
        let known = known.entry(shard).or_default();
        for partition in checkpoint.partitions {
            let log = partition.restore();
            homes.insert(log.key, shard);
            if !log.is_new() {
                known.insert(log.key);
            }
            logs.insert(log.key, log);
        }
    }
    homes.retain(|_, _| found.base.shards == shards);
    let mut out = Recovered {
        incarnation: found.incarnation + 1,
        partitions: Vec::new(),
        replayed: 0,
        homes,
        torn: Vec::new(),
    };
    let files = FileCache::new(host.clone(), config.logs_dir(), config.open_files);
    for (shard, from) in replay_from {
        let journal = replay::replay(host, &config.journal_dir(), shard, found.incarnation, from).await?;
        out.torn.extend(journal.torn_at.clone());
        // Without a checkpoint of its own, nothing of its journal was given up.
        let known = known.get(&shard);
        let has_left = |key: &PartitionKey| known.is_some_and(|known| !known.contains(key));
        apply(
            host,
            &files,
            config.sync_all_min,
            journal,
            &has_left,
            &mut logs,
            &mut out.replayed,
        )
        .await?;
    }
    // What is appended from now on begins in blocks of its own.
    logs.values_mut().for_each(LogState::close_block);
    out.partitions = logs.into_values().collect();
    store_base(host, config, out.incarnation, shards, out.partitions.iter()).await?;
    checkpoint::remove_others(host, &config.checkpoint_dir(), out.incarnation).await?;
    Ok(out)
}

/// Stores the base checkpoint of an incarnation: the partitions as they were when it began. Again, with those that stay, before files
/// are removed of others that may come back.
///
/// # Errors
/// Any failure of the disk; the one before is then still in place.
pub async fn store_base<H: Host>(
    host: &H,
    config: &ShardConfig,
    incarnation: u64,
    shards: u32,
    partitions: impl Iterator<Item = &LogState>,
) -> Result<(), StorageError> {
    let captured = partitions.map(|log| Arc::new(Captured::of(log))).collect();
    let name = Name::Base { incarnation };
    checkpoint::store(host, &config.checkpoint_dir(), name, Position::START, shards, captured).await
}

async fn apply<H: Host>(
    host: &H,
    files: &FileCache<H>,
    sync_all_min: usize,
    journal: Replay,
    has_left: &impl Fn(&PartitionKey) -> bool,
    logs: &mut BTreeMap<PartitionKey, LogState>,
    replayed: &mut u64,
) -> Result<(), StorageError> {
    let (now, logs_dir) = (host.now_ms(), files.logs());
    let mut to_write: BTreeMap<PartitionKey, Vec<Batch>> = BTreeMap::new();
    let mut last_cut: BTreeMap<PartitionKey, usize> = (journal.records.iter().enumerate())
        .filter(|(_, r)| Cut::of(&r.header).is_some())
        .map(|(at, r)| (r.header.key, at))
        .collect();
    // Batches of a partition whose segment failed are in the journal twice, the second time behind later ones: these wait for it.
    let mut early: BTreeMap<PartitionKey, BTreeMap<Offset, Batch>> = BTreeMap::new();
    let mut starts: BTreeMap<PartitionKey, Offset> = BTreeMap::new();
    // Of these the files may be gone already, and may be another segment's by now: of a log that begins anew further on.
    let mut removed: Vec<(PartitionKey, Offset)> = Vec::new();
    for (at, record) in journal.records.into_iter().enumerate() {
        let key = record.header.key;
        let log = logs.entry(key).or_insert_with(|| LogState::new(key));
        if record.header.kind == RecordKind::LogStart {
            starts.insert(key, record.header.base_offset);
            let gone = log.advance_log_start(record.header.base_offset.min(log.log_end()));
            removed.extend(gone.into_iter().map(|s| (key, s.base)));
            continue;
        }
        if let Some(cut) = Cut::of(&record.header) {
            early.remove(&key);
            if matches!(cut, Cut::Restart { .. }) {
                starts.remove(&key);
            }
            // A checkpoint may say less than was there when the cut was made.
            if cut.log_end() <= log.log_end() || matches!(cut, Cut::Restart { .. }) {
                log.cut(&cut, now);
                if let Some(batches) = to_write.get_mut(&key) {
                    batches.retain(|b| b.header.base_offset < cut.log_end() && !matches!(cut, Cut::Restart { .. }));
                }
            }
            continue;
        }
        if record.header.last_offset < log.log_end() {
            continue;
        }
        if record.header.base_offset < log.log_end() {
            // What a cut further on takes away need not fit what a later checkpoint says.
            if last_cut.get(&key).is_some_and(|cut| at < *cut) || has_left(&key) {
                continue;
            }
            return Err(does_not_go_on(logs_dir, log, &record.header));
        }
        let waiting = early.entry(key).or_default();
        waiting.insert(record.header.base_offset, record);
        while let Some(record) = waiting.remove(&log.log_end()) {
            log.apply(&record.header, now);
            log.advance_durable_end(record.header.last_offset + 1);
            log.advance_high_watermark(record.header.last_offset + 1);
            *replayed += 1;
            if record.header.kind == RecordKind::Batch {
                to_write.entry(key).or_default().push(record);
            }
        }
    }
    for (key, waiting) in early {
        let log = &logs[&key];
        let Some(record) = (waiting.into_values()).find(|r| r.header.base_offset >= log.log_end()) else {
            continue;
        };
        if !has_left(&key) {
            return Err(does_not_go_on(logs_dir, log, &record.header));
        }
        tracing::debug!(partition = %key, offset = record.header.base_offset, "records of a copy that has left are left out");
        // Nor are its files taken for another's.
        last_cut.entry(key).or_default();
    }
    for (key, start) in starts {
        let Some(log) = logs.get_mut(&key) else { continue };
        let gone = log.advance_log_start(start.min(log.log_end()));
        removed.extend(gone.into_iter().map(|s| (key, s.base)));
    }
    for (key, base) in removed {
        if logs[&key].segments().iter().all(|s| s.base != base) {
            remove_segment(host, logs_dir, key, base).await?;
        }
    }
    for (key, batches) in &mut to_write {
        if let Some(log) = logs.get(key) {
            // A segment that a later record removed is not brought back.
            batches.retain(|b| log.segments().iter().any(|s| s.base == b.header.segment_base));
        }
    }
    for key in last_cut.keys() {
        remove_cut_segments(host, logs_dir, &logs[key]).await?;
    }
    // As in a pass of write-back: one wait for many partitions.
    let missing = match to_write.len() >= sync_all_min {
        true => Missing::MakeUnsynced,
        false => Missing::Make,
    };
    let written = concurrently(
        PARTITIONS_AT_ONCE,
        to_write
            .iter()
            .map(|(key, batches)| write(host, files, *key, batches, missing)),
    )
    .await;
    written.into_iter().collect::<Result<(), _>>()?;
    if missing == Missing::MakeUnsynced {
        let synced = host.sync_all().await;
        synced.map_err(StorageError::io("sync", logs_dir))?;
    }
    Ok(())
}

fn does_not_go_on(logs_dir: &Path, log: &LogState, header: &BatchHeader) -> StorageError {
    StorageError::Corrupt {
        path: segment_path(logs_dir, &log.key, header.segment_base),
        position: header.segment_position,
        reason: format!(
            "the journal goes on at offset {} but the log ends at {}: acknowledged records are missing",
            header.base_offset,
            log.log_end()
        ),
    }
}

async fn remove_segment<H: Host>(host: &H, logs_dir: &Path, key: PartitionKey, base: i64) -> Result<(), StorageError> {
    remove_if_there(host, &segment_path(logs_dir, &key, base)).await?;
    remove_index(host, logs_dir, key, base).await
}

async fn remove_index<H: Host>(host: &H, logs_dir: &Path, key: PartitionKey, base: i64) -> Result<(), StorageError> {
    remove_if_there(host, &segment::index_path(logs_dir, &key, base)).await
}

async fn remove_if_there<H: Host>(host: &H, path: &Path) -> Result<(), StorageError> {
    match host.remove_file(path).await {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(StorageError::io("remove", path)(source)),
        _ => Ok(()),
    }
}

/// Removes segments that a cut left without anything; a crash may have come before they were removed.
async fn remove_cut_segments<H: Host>(host: &H, logs_dir: &Path, log: &LogState) -> Result<(), StorageError> {
    let dir = segment::partition_dir(logs_dir, &log.key);
    for name in host.list(&dir).map_err(StorageError::io("list", &dir))? {
        let base = name.strip_suffix(".segment").and_then(|b| b.parse::<i64>().ok());
        if let Some(base) = base.filter(|b| log.segments().iter().all(|s| s.base != *b)) {
            remove_segment(host, logs_dir, log.key, base).await?;
        }
    }
    // What was indexed may be what was cut.
    for segment in log.segments() {
        remove_index(host, logs_dir, log.key, segment.base).await?;
    }
    Ok(())
}

/// Writes batches of one partition, and makes them durable unless the caller does ([`Missing::MakeUnsynced`]).
async fn write<H: Host>(
    host: &H,
    files: &FileCache<H>,
    key: PartitionKey,
    batches: &[Batch],
    missing: Missing,
) -> Result<(), StorageError> {
    let mut touched = Vec::new();
    for run in segment::runs(batches) {
        let base = run[0].header.segment_base;
        let file = files.get(key, base, missing).await?;
        let path = segment_path(files.logs(), &key, base);
        segment::write_run(host, &file, &path, run, None).await?;
        if touched.last().is_none_or(|(b, _, _)| *b != base) {
            touched.push((base, file, path));
        }
    }
    if missing == Missing::MakeUnsynced {
        return Ok(());
    }
    for (_, file, path) in touched {
        file.flush().await.map_err(StorageError::io("flush", &path))?;
    }
    Ok(())
}

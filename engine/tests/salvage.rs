//! What salvage finds in sound and in damaged folders.

mod common;

use std::collections::BTreeSet;

use common::{LOG, append, config, key};
use millrace_engine::{
    StorageError,
    batch::Batch,
    disk::sim::{SimHost, SimRng},
    log::LogState,
    recovery,
    salvage::{Damage, Salvage},
    shard::Shard,
};

/// Thirty batches over several segments, the last ten only in the journal, and a second partition.
fn folder() -> SimHost {
    let host = SimHost::new();
    let h = host.clone();
    host.run(async move {
        let recovered = recovery::recover(&h, &config(0, 0), 1).await.expect("sound");
        let shard = Shard::open(h.clone(), config(0, recovered.incarnation))
            .await
            .expect("opens");
        let commits = shard.clone();
        millrace_engine::host::Host::spawn(&h, async move { commits.run_commits().await });
        for partition in 0..2 {
            shard.add_partition(LogState::new(key(partition)), LOG);
        }
        for n in 0..20 {
            let large = if n == 7 { 9_000 } else { 3_000 };
            append(&shard, 0, &[n as u8; 9_000][..large])
                .await
                .expect("acknowledged");
            append(&shard, 1, b"other").await.expect("acknowledged");
        }
        shard.flush_all().await.expect("written");
        for n in 20..30 {
            append(&shard, 0, &[n as u8; 2_000]).await.expect("acknowledged");
        }
    })
    .expect("ends");
    host.after_kill()
}

fn salvage(disk: &SimHost, partition: u32) -> (Vec<i64>, Vec<Damage>) {
    let d = disk.clone();
    disk.run(async move {
        let salvage = Salvage::open(d, &config(0, 0).dir).await.expect("readable");
        let mut offsets = Vec::new();
        let mut damage = salvage.damage().to_vec();
        let visit = |batch: &Batch| -> Result<(), StorageError> {
            offsets.push(batch.header.base_offset);
            Ok(())
        };
        damage.extend(salvage.visit(key(partition), visit).await.expect("readable"));
        (offsets, damage)
    })
    .expect("ends")
}

#[test]
fn a_sound_folder_gives_every_acknowledged_batch_and_no_damage() {
    let disk = folder();
    assert_eq!(salvage(&disk, 0), ((0..30).collect(), vec![]));
    assert_eq!(salvage(&disk, 1), ((0..20).collect(), vec![]));
}

#[test]
fn behind_damage_of_a_segment_the_next_batch_is_found_again() {
    // Whichever bytes are hit, what is lost is what they belong to and nothing else.
    for seed in 0..60 {
        let mut rng = SimRng::new(seed);
        let disk = folder();
        let segments: Vec<_> = disk
            .files()
            .into_iter()
            .filter(|p| p.to_string_lossy().ends_with(".segment") && p.to_string_lossy().contains("/0/"))
            .collect();
        assert!(segments.len() > 1, "the test wants several segments");
        let hit = &segments[rng.below(segments.len() as u64) as usize];
        let size = disk.contents(hit).len() as u64;
        let byte = 4096 + rng.below(size - 4096);
        let was = disk.contents(hit)[byte as usize];
        disk.flip_bit(hit, byte);
        let (offsets, damage) = salvage(&disk, 0);
        let lost: BTreeSet<i64> = (0..30).filter(|n| !offsets.contains(n)).collect();
        assert!(
            offsets.is_sorted() && lost.len() <= 1,
            "seed {seed}: lost {lost:?} by byte {byte} (was {was})"
        );
        // Padding may be hit: nothing is lost then.
        if !lost.is_empty() {
            assert!(
                matches!(&damage[0], Damage::Bytes { path, .. } if path == hit),
                "seed {seed}: {damage:?}"
            );
            assert!(
                damage.iter().any(|d| matches!(d, Damage::Offsets { .. })),
                "seed {seed}: {damage:?}"
            );
        }
    }
}

#[test]
fn a_journal_that_recovery_refuses_still_gives_its_other_groups() {
    let disk = folder();
    let journal = disk
        .files()
        .into_iter()
        .filter(|p| p.to_string_lossy().ends_with(".journal"))
        .find(|p| {
            disk.contents(p)[4096..]
                .chunks(4096)
                .any(|block| block[128 + 200..].starts_with(&[25; 64]))
        })
        .expect("the group of batch 25");
    let at = disk.contents(&journal)[4096..]
        .chunks(4096)
        .position(|block| block[128 + 200..].starts_with(&[25; 64]))
        .expect("found before");
    disk.flip_bit(&journal, 4096 * (at as u64 + 1) + 400);
    let refused = disk.run(recovery::recover(&disk, &config(0, 0), 1)).expect("ends");
    assert!(matches!(refused, Err(StorageError::Corrupt { .. })), "{refused:?}");
    let (offsets, damage) = salvage(&disk, 0);
    assert_eq!(offsets, (0..30).filter(|n| *n != 25).collect::<Vec<_>>());
    assert_eq!(
        damage,
        [Damage::Offsets {
            key: key(0),
            from: 25,
            until: 26
        }]
    );
}

#[test]
fn damaged_checkpoints_are_told_and_not_needed() {
    let disk = folder();
    for file in disk.files() {
        if file.to_string_lossy().ends_with(".checkpoint") {
            disk.flip_bit(&file, 4096 + 20);
        }
    }
    let (offsets, damage) = salvage(&disk, 0);
    assert_eq!(offsets, (0..30).collect::<Vec<_>>());
    assert!(matches!(damage[..], [Damage::Bytes { .. }]), "{damage:?}");
}

#[test]
fn damage_met_by_a_read_takes_the_partition_offline_for_appends_only() {
    let disk = folder();
    let hit = disk
        .files()
        .into_iter()
        .find(|p| p.to_string_lossy().ends_with("/0/00000000000000000000.segment"))
        .expect("the first segment");
    let d = disk.clone();
    disk.run(async move {
        let recovered = recovery::recover(&d, &config(0, 0), 1)
            .await
            .expect("segments are not read");
        let shard = Shard::open(d.clone(), config(0, recovered.incarnation))
            .await
            .expect("opens");
        let commits = shard.clone();
        millrace_engine::host::Host::spawn(&d, async move { commits.run_commits().await });
        for state in recovered.partitions {
            shard.add_partition(state, LOG);
        }
        append(&shard, 0, b"sound so far").await.expect("acknowledged");
        d.flip_bit(&hit, 4096 + 3_500);
        let before = shard
            .read(key(0), 0, 1 << 20, true)
            .await
            .expect("what stands before the damage");
        assert_eq!(before.next_offset, 1);
        let error = shard
            .read(key(0), 1, 1 << 20, true)
            .await
            .expect_err("the second batch is damaged");
        assert!(error.to_string().contains("is corrupt at byte"), "{error}");
        append(&shard, 0, b"no more").await.expect_err("offline");
        let sound = shard.read(key(0), 25, 1 << 20, true).await.expect("the rest is read");
        assert_eq!(sound.next_offset, 31);
        append(&shard, 1, b"other").await.expect("other partitions go on");
    })
    .expect("ends");
}

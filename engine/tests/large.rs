//! Large batches: through the journal while it has plenty of room, straight to their segment where it has not.

mod common;

use common::{LOG, append, config, key, open_shards};
use millrace_engine::{disk::sim::SimHost, log::LogState, recovery, sync::concurrently};

const PARTITIONS: u32 = 6;
const MANY: u32 = 60;

#[test]
fn large_batches_take_the_journal_while_it_has_room() {
    let host = SimHost::new();
    let h = host.clone();
    host.run(async move {
        recovery::recover(&h, &config(0, 0), 1).await.expect("sound");
        let shard = open_shards(&h, 1, 1).await.expect("opens").remove(0);
        let direct = || shard.counters().direct_batches.get();
        for p in 0..PARTITIONS {
            shard.add_partition(LogState::new(key(p)), LOG);
        }
        append(&shard, 0, &[7; 8_000]).await.expect("appended");
        assert_eq!(direct(), 0, "the journal is all but empty");
        append(&shard, 0, &[7; 20_000]).await.expect("appended");
        assert_eq!(direct(), 1, "no group holds it");

        // Together they are three times the ring: some wait for no room in it.
        let values: Vec<[u8; 8_000]> = (0..MANY).map(|n| [n as u8; 8_000]).collect();
        let many = (0..MANY).map(|n| append(&shard, n % PARTITIONS, &values[n as usize]));
        let offsets = concurrently(MANY as usize, many).await;
        println!("{} of {MANY} straight to their segments", direct() - 1);
        assert!((2..u64::from(MANY)).contains(&direct()), "{}", direct());
        for (n, offset) in (0..MANY).zip(offsets) {
            let offset = offset.expect("appended");
            let records = shard.read(key(n % PARTITIONS), offset, 1, true).await.expect("read");
            assert_eq!(records.next_offset, offset + 1);
            let value = &values[n as usize];
            assert!(records.bytes.windows(value.len()).any(|w| w == value), "value {n}");
        }
    })
    .expect("ends");
}

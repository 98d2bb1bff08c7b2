//! The times of the records in compressed batches, for look-ups by time: unpacked in pieces, of which nothing is kept, while others run.

use std::rc::Rc;

use bytes::Bytes;
use millrace_engine::{BatchError, host::Host, kafka_batch::BatchInfo, record_walk::RecordWalk, shard::RecordTimes};
use millrace_net::kafka::compression::{CompressionError, Unpacker};

use super::check::TURN;
use crate::node::Node;

/// Unpacks with what the node keeps for it, up to `decompress.max.bytes`.
pub struct Unpacked<'a>(pub &'a Rc<Node>);

impl RecordTimes for Unpacked<'_> {
    async fn each(
        &self,
        info: &BatchInfo,
        packed: Bytes,
        visit: &mut dyn FnMut(i32, i64) -> bool,
    ) -> Result<(), BatchError> {
        let mut unpacker = self.0.unpackers.take();
        let read = self.walk(&mut unpacker, info, &packed, visit).await;
        self.0.unpackers.give_back(unpacker);
        read
    }
}

impl Unpacked<'_> {
    async fn walk(
        &self,
        unpacker: &mut Unpacker,
        info: &BatchInfo,
        packed: &[u8],
        visit: &mut dyn FnMut(i32, i64) -> bool,
    ) -> Result<(), BatchError> {
        let failed = |e: CompressionError| BatchError::Decompress { reason: e.to_string() };
        let limit = self.0.shared.settings.number("decompress.max.bytes") as usize;
        let mut pieces = unpacker.begin(info.compression(), packed, limit).map_err(failed)?;
        let mut walk = RecordWalk::new(info);
        let (mut goes_on, mut turn) = (true, 0);
        while goes_on && let Some(piece) = pieces.next_piece().map_err(failed)? {
            turn += piece.len();
            walk.push(piece, &mut |delta, timestamp| {
                goes_on = goes_on && visit(delta, timestamp)
            })?;
            if turn >= TURN {
                turn = 0;
                self.0.host.yield_now().await;
            }
        }
        Ok(())
    }
}

//! InitProducerId, versions 0 to 5: ids for idempotent producers, in blocks that the metadata log hands out. A producer that
//! presents its id gets the next epoch (KIP-360). Transactional ids are refused until transactions exist.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{InitProducerIdRequest, InitProducerIdResponse},
};
use millrace_cluster::metadata::MetadataRecord;

use crate::{kafka::errors::Failure, node::Node};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: InitProducerIdRequest) -> InitProducerIdResponse {
    let refuse = |code: i16| {
        InitProducerIdResponse::default()
            .with_error_code(code)
            .with_producer_id((-1).into())
            .with_producer_epoch(-1)
    };
    if request.transactional_id.is_some() {
        return refuse(ResponseError::TransactionalIdAuthorizationFailed.code());
    }
    if request.producer_id.0 >= 0 && request.producer_epoch >= 0 && request.producer_epoch < i16::MAX - 1 {
        return InitProducerIdResponse::default()
            .with_producer_id(request.producer_id)
            .with_producer_epoch(request.producer_epoch + 1);
    }
    let id = node
        .router
        .call(node, 0, |n| async move { n.coordinator().producer_ids.next(&n).await })
        .await
        .map_err(Failure::from)
        .and_then(|r| r);
    match id {
        Ok(id) => InitProducerIdResponse::default().with_producer_id(id.into()),
        Err(failure) => refuse(failure.code()),
    }
}

/// Ids of one block, handed out one by one on the coordinator shard.
#[derive(Default)]
pub struct ProducerIds {
    free: std::cell::Cell<(i64, i64)>,
}

/// Ids in a block, as in Kafka: one record of the metadata log for a thousand producers.
const BLOCK: i64 = 1000;

impl ProducerIds {
    async fn next(&self, node: &Rc<Node>) -> Result<i64, Failure> {
        let (next, end) = self.free.get();
        if next < end {
            self.free.set((next + 1, end));
            return Ok(next);
        }
        let start = node
            .coordinator()
            .controller
            .change(node, |image| {
                let start = image.next_producer_id;
                (vec![MetadataRecord::ProducerIds { next: start + BLOCK }], start)
            })
            .await?;
        // Others may have waited for a block of their own; what is left of one is dropped.
        self.free.set((start + 1, start + BLOCK));
        Ok(start)
    }
}

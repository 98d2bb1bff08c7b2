//! UnregisterBroker, version 0 (KIP-631): forgets a broker that is gone for good.

use std::rc::Rc;

use kafka_protocol::messages::{UnregisterBrokerRequest, UnregisterBrokerResponse};
use millrace_cluster::controller::brokers;

use crate::{coordinator::controller::propose, kafka::errors::Failure, node::Node};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: UnregisterBrokerRequest) -> UnregisterBrokerResponse {
    let broker = request.broker_id.0;
    let done = propose(node, false, move |_, image| {
        brokers::unregister(image, broker).map_err(Failure::from)
    });
    match done.await {
        Ok(()) => UnregisterBrokerResponse::default(),
        Err(failure) => UnregisterBrokerResponse::default()
            .with_error_code(failure.code())
            .with_error_message(failure.text()),
    }
}

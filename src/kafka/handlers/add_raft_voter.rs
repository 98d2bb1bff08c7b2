//! AddRaftVoter, version 0 (KIP-853): a node that follows the metadata quorum votes in it from now on. Where it listens the node
//! itself has said.

use std::{rc::Rc, time::Duration};

use kafka_protocol::messages::{AddRaftVoterRequest, AddRaftVoterResponse};

use crate::{
    kafka::{idle, raft_voters},
    node::Node,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: AddRaftVoterRequest) -> AddRaftVoterResponse {
    let patience = Duration::from_millis(request.timeout_ms.max(0) as u64).min(idle::wait_max(node));
    let (id, directory) = (request.voter_id, request.voter_directory_id);
    let done = raft_voters::set(node, request.cluster_id.as_deref(), id, directory, true, patience);
    match done.await {
        Ok(()) => AddRaftVoterResponse::default(),
        Err(failure) => AddRaftVoterResponse::default()
            .with_error_code(failure.code())
            .with_error_message(failure.text()),
    }
}

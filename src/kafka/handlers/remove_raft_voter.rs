//! RemoveRaftVoter, version 0 (KIP-853): a voter of the metadata quorum only follows it from now on.

use std::{rc::Rc, time::Duration};

use kafka_protocol::messages::{RemoveRaftVoterRequest, RemoveRaftVoterResponse};

use crate::{kafka::raft_voters, node::Node};

/// How long it may take until it holds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: RemoveRaftVoterRequest) -> RemoveRaftVoterResponse {
    let (id, directory) = (request.voter_id, request.voter_directory_id);
    let done = raft_voters::set(node, request.cluster_id.as_deref(), id, directory, false, PATIENCE);
    match done.await {
        Ok(()) => RemoveRaftVoterResponse::default(),
        Err(failure) => RemoveRaftVoterResponse::default()
            .with_error_code(failure.code())
            .with_error_message(failure.text()),
    }
}

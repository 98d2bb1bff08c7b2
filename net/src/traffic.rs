//! What comes and goes over a connection, for whoever watches over many of them.

use std::{
    cell::Cell,
    os::fd::{BorrowedFd, RawFd},
};

use rustix::net::{Shutdown, shutdown};

/// One connection's, shared by its halves: while one of them is there, its socket is open.
#[derive(Default, Debug)]
pub struct Traffic {
    /// The socket; none for a stream that is not one.
    socket: Option<RawFd>,
    bytes: Cell<u64>,
    /// A frame has begun, and its rest is waited for.
    receives: Cell<bool>,
    /// Something is being sent.
    sends: Cell<bool>,
}

impl Traffic {
    pub(crate) fn of(socket: RawFd) -> Self {
        Self {
            socket: Some(socket),
            ..Self::default()
        }
    }

    pub(crate) fn passed(&self, bytes: usize) {
        self.bytes.set(self.bytes.get() + bytes as u64);
    }

    pub(crate) fn set_receives(&self, receives: bool) {
        self.receives.set(receives);
    }

    pub(crate) fn set_sends(&self, sends: bool) {
        self.sends.set(sends);
    }

    /// Bytes that have come and gone so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Whether it waits for the peer to send the rest of a frame.
    #[must_use]
    pub fn receives(&self) -> bool {
        self.receives.get()
    }

    /// Whether it waits for the peer to take what is sent.
    #[must_use]
    pub fn sends(&self) -> bool {
        self.sends.get()
    }

    /// The socket, for what glommio cannot do with a stream whose halves are borrowed: to send several slices, to shut it down.
    #[must_use]
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: a half of the connection holds this, and with it the stream that owns the descriptor.
        self.socket.map(|socket| unsafe { BorrowedFd::borrow_raw(socket) })
    }

    /// Ends the connection: whoever waits to receive or to send hears that the peer has gone.
    pub fn cut(&self) {
        if let Some(socket) = self.socket() {
            // It fails only where the peer has gone already.
            let _ = shutdown(socket, Shutdown::Both);
        }
    }
}

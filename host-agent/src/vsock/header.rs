//! The 44-byte packet header of virtio-vsock (virtio 1.2, section 5.10.6).

/// Bytes of a header on the wire.
pub(super) const HEADER_BYTES: usize = 44;

/// The host's address as the guest sees it (`VMADDR_CID_HOST`).
pub(super) const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only socket type served.
pub(super) const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_RCV`: the sender will receive nothing more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_SEND`: the sender will send nothing more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// Both directions.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    /// Anything else; answered with a reset.
    Unknown(u16),
}

impl Op {
    fn from_wire(op: u16) -> Self {
        match op {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::Data,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            other => Op::Unknown(other),
        }
    }

    fn to_wire(self) -> u16 {
        match self {
            Op::Request => 1,
            Op::Response => 2,
            Op::Reset => 3,
            Op::Shutdown => 4,
            Op::Data => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
            Op::Unknown(other) => other,
        }
    }
}

/// One packet header, in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload behind the header.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: Op,
    pub(super) flags: u32,
    /// Receive buffer of the sender, bytes.
    pub(super) buf_alloc: u32,
    /// Bytes the sender's application has taken so far, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// The header as it lies in guest memory (little endian).
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_wire().to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// Reads a header. Every bit pattern is a header: judging it is the caller's business.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
            let mut out = [0; N];
            out.copy_from_slice(&bytes[at..at + N]);
            out
        }
        Header {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: Op::from_wire(u16::from_le_bytes(field(bytes, 30))),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// The reset that answers this packet.
    pub(super) fn reset_reply(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            kind: self.kind,
            op: Op::Reset,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let header = Header {
            src_cid: 2,
            dst_cid: 0x0102_0304_0506_0708,
            src_port: 0x1122_3344,
            dst_port: 5,
            len: 0x1000,
            kind: TYPE_STREAM,
            op: Op::Data,
            flags: 3,
            buf_alloc: 0x0004_0000,
            fwd_cnt: 0xffff_fffe,
        };
        let expected: [u8; HEADER_BYTES] = [
            2, 0, 0, 0, 0, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1, 0x44, 0x33, 0x22, 0x11, 5, 0, 0, 0, 0, 0x10, 0,
            0, 1, 0, 5, 0, 3, 0, 0, 0, 0, 0, 4, 0, 0xfe, 0xff, 0xff, 0xff,
        ];
        assert_eq!(header.encode(), expected);
        assert_eq!(Header::decode(&expected), header);
    }

    proptest! {
        #[test]
        fn any_bytes_decode_and_encode_back(
            head in any::<[u8; 32]>(),
            tail in any::<[u8; 12]>(),
        ) {
            let mut bytes = [0; HEADER_BYTES];
            bytes[..32].copy_from_slice(&head);
            bytes[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::decode(&bytes).encode(), bytes);
        }
    }
}

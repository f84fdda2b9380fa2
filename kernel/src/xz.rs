//! The framing of xz data, walked without unpacking: how much memory would it take?
//!
//! A decoder allocates the dictionary that a block header asks for, up to 4 GiB, before it sees a single byte of data.
//! This walk meets the same headers in the same order as the decoder, because all lengths stand in the framing.
//! Format: "The .xz File Format" 1.2.1, sections 2 and 3; LZMA2 chunks as in XZ Embedded `xz_dec_lzma2.c`.

const STREAM_HEADER: usize = 12;
const LZMA2: u64 = 0x21;
/// Filters for machine code and the delta filter, which need no memory.
const PLAIN_FILTERS: std::ops::RangeInclusive<u64> = 0x03..=0x0b;
/// Bytes of the check after a block, by its kind.
const CHECKS: [usize; 16] = [0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64];

/// What unpacking takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// The largest dictionary of all blocks, in bytes.
    pub(crate) dictionary: u64,
    /// Unpacked length of all blocks, in bytes.
    pub(crate) unpacked: u64,
}

/// What unpacking the first stream of `bytes` takes; nothing when the framing is damaged or unusual.
pub(crate) fn needs(bytes: &[u8]) -> Option<Needs> {
    let mut cursor = Cursor { bytes, at: 0 };
    let header = cursor.take(STREAM_HEADER)?;
    let check = CHECKS[usize::from(header[7] & 0x0f)];
    let mut needs = Needs::default();
    // Each turn consumes at least a block header.
    while let size @ 1.. = cursor.byte()? {
        let start = cursor.at - 1;
        let dictionary = block_header(cursor.take((usize::from(size) + 1) * 4 - 1)?)?;
        needs.dictionary = needs.dictionary.max(dictionary);
        needs.unpacked += chunks(&mut cursor)?;
        let length = cursor.at - start;
        cursor.take(length.next_multiple_of(4) - length + check)?;
    }
    Some(needs)
}

/// The dictionary size that a block header (without its first byte) asks for.
fn block_header(header: &[u8]) -> Option<u64> {
    let mut cursor = Cursor { bytes: header, at: 0 };
    let flags = cursor.byte()?;
    for present in [0x40, 0x80] {
        if flags & present != 0 {
            cursor.number()?;
        }
    }
    for _ in 0..flags & 3 {
        let filter = cursor.number()?;
        let properties = usize::try_from(cursor.number()?).ok()?;
        cursor.take(properties)?;
        if !PLAIN_FILTERS.contains(&filter) {
            return None;
        }
    }
    let (filter, properties, bits) = (cursor.number()?, cursor.number()?, cursor.byte()?);
    if filter != LZMA2 || properties != 1 {
        return None;
    }
    match u64::from(bits) {
        40 => Some(u64::from(u32::MAX)),
        bits @ 0..40 => Some((2 | (bits & 1)) << (bits / 2 + 11)),
        _ => None,
    }
}

/// Walks LZMA2 chunks up to their end; their unpacked length.
fn chunks(cursor: &mut Cursor<'_>) -> Option<u64> {
    let mut unpacked = 0;
    loop {
        match cursor.byte()? {
            0 => return Some(unpacked),
            1 | 2 => {
                let length = cursor.length()?;
                cursor.take(length)?;
                unpacked += length as u64;
            }
            3..0x80 => return None,
            control => {
                unpacked += (u64::from(control & 0x1f) << 16) + cursor.length()? as u64;
                let packed = cursor.length()?;
                cursor.take(packed + usize::from(control >= 0xc0))?;
            }
        }
    }
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(length)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }

    /// A length minus one in two bytes, as LZMA2 has it.
    fn length(&mut self) -> Option<usize> {
        let bytes = self.take(2)?;
        Some(usize::from(u16::from_be_bytes([bytes[0], bytes[1]])) + 1)
    }

    /// A number of seven bits a byte, at most nine bytes, as the container has it.
    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for place in 0..9 {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use lzma_rust2::{XzOptions, XzWriter};

    use super::*;

    fn packed(options: XzOptions, content: &[u8]) -> Vec<u8> {
        let mut writer = XzWriter::new(Vec::new(), options).unwrap();
        writer.write_all(content).unwrap();
        writer.finish().unwrap()
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..length).map(|_| next()).collect()
    }

    #[test]
    fn length_and_dictionary_are_those_of_the_encoder() {
        for content in [vec![], b"a".to_vec(), vec![0; 300_000], noise(300_000)] {
            let options = XzOptions::with_preset(6);
            let dictionary = u64::from(options.lzma_options.dict_size);
            let needs = needs(&packed(options, &content)).unwrap();
            assert_eq!(needs.unpacked, content.len() as u64);
            assert!(content.is_empty() || needs.dictionary == dictionary, "{needs:?}");
        }
    }

    #[test]
    fn every_block_counts_and_bytes_after_the_stream_do_not() {
        let mut options = XzOptions::with_preset(0);
        options.set_block_size(std::num::NonZeroU64::new(options.lzma_options.dict_size.into()));
        let mut bytes = packed(options, &noise(1 << 20));
        bytes.extend(b"after");
        assert_eq!(needs(&bytes).unwrap().unpacked, 1 << 20);
    }

    #[test]
    fn a_greedy_dictionary_is_seen_in_any_block() {
        let mut options = XzOptions::with_preset(0);
        options.set_block_size(std::num::NonZeroU64::new(options.lzma_options.dict_size.into()));
        let good = packed(options, &noise(1 << 20));
        // Header of 12 bytes, one filter, no lengths, LZMA2, one property.
        let headers: Vec<usize> = good
            .windows(4)
            .enumerate()
            .filter(|(_, four)| *four == [2, 0, 0x21, 1])
            .map(|(at, _)| at + 4)
            .collect();
        assert!(headers.len() > 1);
        let last = headers.last().unwrap();
        let mut greedy = good.clone();
        greedy[*last] = 40;
        assert_eq!(needs(&greedy).unwrap().dictionary, u64::from(u32::MAX));
        greedy[*last] = 41;
        assert_eq!(needs(&greedy), None);
    }

    #[test]
    fn cut_data_have_no_measure() {
        let good = packed(XzOptions::with_preset(1), &noise(5_000));
        let index = good.len() - 40;
        for length in (0..index).step_by(7) {
            assert_eq!(needs(&good[..length]), None, "{length}");
        }
    }
}

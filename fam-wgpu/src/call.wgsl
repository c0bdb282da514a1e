// Device spans, the sink and beta become part of the call block. See `call.rs`: this is its `record` for spans that nobody has checked.

@group(1) @binding(0) var<storage, read_write> spans: array<u32>;
@group(1) @binding(1) var<storage, read_write> sink: array<u32>;
@group(1) @binding(2) var<storage, read_write> beta: array<u32>;

// (low, high) modulo m, where m < 2^31, bit by bit.
fn modulo(low: u32, high: u32, m: u32) -> u32 {
    var r = high % m;
    for (var i = 0u; i < 32u; i++) {
        r = (2u * r + ((low >> (31u - i)) & 1u)) % m;
    }
    return r;
}

fn load(n: u32) -> Stream {
    let at = size(SpansAt) - 1u + 10u * n;
    let start = vec2(spans[at], spans[at + 1u]);
    let origin = vec2(spans[at + 2u], spans[at + 3u]);
    let slot = spans[at + 5u];
    let before = vec2(start.x - origin.x, start.y - origin.y - u32(start.x < origin.x));
    let is_before = start.y < origin.y || (start.y == origin.y && start.x < origin.x);
    if (slot >= size(Slots) || is_before || start.y > 0x7fffffffu) {
        return Stream();
    }
    let block_len = size(BlockLen);
    let in_block = modulo(start.x, start.y, block_len);
    var len = min(min(spans[at + 4u], size(Rows)), size(MostBlocks) * block_len - in_block);
    let key_rows = size(KeyRows);
    var first_row = before.x;
    if (key_rows != 0xffffffffu) {
        len = min(len, select(0u, key_rows - min(before.x, key_rows), before.y == 0u));
    } else if (size(RingRows) > 0u) {
        first_row = modulo(before.x, before.y, size(RingRows));
    }
    let mem_rows = select(0u, min(spans[at + 6u], size(MemLen)), size(HasMem) == 1u);
    return Stream(
        len,
        slot,
        mem_rows,
        spans[at + 7u] % size(MemEntries),
        spans[at + 8u] % size(StateEntries),
        select(0u, (in_block + len - 1u) / block_len + 1u, len > 0u),
        in_block,
        first_row,
        select(min(before.x, 1u << 30u), 1u << 30u, before.y > 0u),
        1u,
    );
}

fn writes(s: Stream) -> bool {
    return s.len > 0u || (size(Writes) == 1u && s.mem_rows > 0u);
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let i = group_number(group) * 64u + local;
    if (i < size(Heads)) {
        if (size(SinkAt) > 0u) {
            call[size(SinkAt) + i] = sink[place(tensor(Sink), 0u, 0u, 0u, i)];
        }
        if (size(BetaAt) > 0u) {
            call[size(BetaAt) + i] = beta[place(tensor(Beta), 0u, 0u, 0u, i)];
        }
    }
    if (i < size(Batch) && size(SpansAt) > 0u) {
        var s = load(i);
        if (size(Writes) > 0u) {
            s.owns_slot = u32(writes(s));
            for (var other = 0u; other < i; other++) {
                let o = load(other);
                s.owns_slot &= u32(!(o.slot == s.slot && writes(o)));
            }
        }
        let at = STREAMS + STREAM * i;
        call[at] = s.len;
        call[at + 1u] = s.slot;
        call[at + 2u] = s.mem_rows;
        call[at + 3u] = s.mem_entry;
        call[at + 4u] = s.state_entry;
        call[at + 5u] = s.blocks;
        call[at + 6u] = s.in_block;
        call[at + 7u] = s.first_row;
        call[at + 8u] = s.before;
        call[at + 9u] = s.owns_slot;
    }
}

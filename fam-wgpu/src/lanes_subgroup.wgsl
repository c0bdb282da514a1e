// Eight threads, from a multiple of eight on, as lanes of one subgroup. No device promises how large that is or where in it a thread lies, so
// each workgroup looks.

var<workgroup> strays: atomic<u32>;

// Whether the threads numbered thread ^ 1, ^ 2 and ^ 4 are just so many lanes away, in the whole workgroup.
fn are_lanes(thread: u32) -> bool {
    let near = vec3(subgroupShuffleXor(thread, 1u), subgroupShuffleXor(thread, 2u), subgroupShuffleXor(thread, 4u));
    let is_stray = subgroupAdd(1u) < 8u || any(near != (vec3(thread) ^ vec3(1u, 2u, 4u)));
    if (thread == 0u) {
        atomicStore(&strays, 0u);
    }
    workgroupBarrier();
    if (is_stray) {
        atomicAdd(&strays, 1u);
    }
    workgroupBarrier();
    return atomicLoad(&strays) == 0u;
}

// The largest of the eight; anything where they are no lanes.
fn largest_of_lanes(x: vec4<f32>) -> vec4<f32> {
    let two = max(x, subgroupShuffleXor(x, 1u));
    let four = max(two, subgroupShuffleXor(two, 2u));
    return max(four, subgroupShuffleXor(four, 4u));
}

// What WGSL does at its plainest best, to measure `attend` by: C = A B for matrices of 512 x 512, 16 x 16 threads with 4 x 4 sums each.

@group(0) @binding(0) var<storage, read> a: array<vec4f>;
@group(0) @binding(1) var<storage, read> b: array<vec4f>;
@group(0) @binding(2) var<storage, read_write> c: array<vec4f>;

// Vectors in a row.
const ROW = 128u;

// 64 rows of A by 16 columns, and 16 rows of B by 64 columns.
var<workgroup> tile_a: array<vec4f, 256>;
var<workgroup> tile_b: array<vec4f, 256>;

@compute @workgroup_size(16, 16)
fn main(
    @builtin(workgroup_id) group: vec3u,
    @builtin(local_invocation_id) thread: vec3u,
    @builtin(local_invocation_index) i: u32,
) {
    var sum: array<vec4f, 4>;
    for (var k = 0u; k < ROW; k += 4u) {
        tile_a[i] = a[(64u * group.y + i / 4u) * ROW + k + i % 4u];
        tile_b[i] = b[(4u * k + i / 16u) * ROW + 16u * group.x + i % 16u];
        workgroupBarrier();
        for (var step = 0u; step < 4u; step++) {
            let b0 = tile_b[64u * step + thread.x];
            let b1 = tile_b[64u * step + 16u + thread.x];
            let b2 = tile_b[64u * step + 32u + thread.x];
            let b3 = tile_b[64u * step + 48u + thread.x];
            for (var row = 0u; row < 4u; row++) {
                let x = tile_a[4u * (4u * thread.y + row) + step];
                sum[row] = fma(vec4f(x.w), b3, fma(vec4f(x.z), b2, fma(vec4f(x.y), b1, fma(vec4f(x.x), b0, sum[row]))));
            }
        }
        workgroupBarrier();
    }
    for (var row = 0u; row < 4u; row++) {
        c[(64u * group.y + 4u * thread.y + row) * ROW + 16u * group.x + thread.x] = sum[row];
    }
}

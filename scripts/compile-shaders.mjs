// Compiles every .wgsl of a folder in Dawn, for its device that does nothing and has the least limits of WebGPU. A message of the compiler fails, and
// so does a pipeline that cannot be made, but for a text that is meant for a larger device.
import { create, globals } from 'webgpu';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { exit } from 'node:process';

Object.assign(globalThis, globals);
const folder = process.argv[2];
const gpu = create(['backend=null']);
const adapter = await gpu.requestAdapter();
if (!adapter) throw new Error('no adapter');
const { maxStorageBuffersPerShaderStage, maxComputeWorkgroupStorageSize, maxComputeInvocationsPerWorkgroup, maxComputeWorkgroupSizeX } = adapter.limits;
const requiredLimits = { maxStorageBuffersPerShaderStage, maxComputeWorkgroupStorageSize, maxComputeInvocationsPerWorkgroup, maxComputeWorkgroupSizeX };
const requiredFeatures = ['subgroups'];
const device = await adapter.requestDevice({ requiredLimits, requiredFeatures });
console.log(adapter.info.description, adapter.info.device, requiredLimits);

let compiled = 0, failed = 0;
const beyond = [];
for (const name of readdirSync(folder).filter((name) => name.endsWith('.wgsl')).sort()) {
  const code = readFileSync(join(folder, name), 'utf8');
  const module = device.createShaderModule({ code });
  const { messages } = await module.getCompilationInfo();
  for (const { type, lineNum, linePos, message } of messages) console.error(`${name}:${lineNum}:${linePos}: ${type}: ${message}`);
  try {
    await device.createComputePipelineAsync({ layout: 'auto', compute: { module, entryPoint: 'main' } });
  } catch (error) {
    if (messages.length == 0 && /larger than the maximum allowed|exceeds the maximum per-stage limit/.test(error.message)) {
      beyond.push(error.message.split('\n')[0]);
      continue;
    }
    console.error(`${name}: ${error.message}`);
    failed += 1;
    continue;
  }
  messages.length == 0 ? (compiled += 1) : (failed += 1);
}
if (beyond.length) console.log(`${beyond.length} for larger devices, such as: ${beyond[0]}`);
console.log(`${compiled + beyond.length} compiled, ${compiled} of them to pipelines`);
console.log(`${compiled + beyond.length} passed, ${failed} failed`);
exit(failed || !compiled ? 1 : 0);

// kafkajs against a broker: idempotent producing, a consumer group, and admin requests.
const { Kafka, CompressionTypes, logLevel } = require('kafkajs')
const kafka = new Kafka({ clientId: 'compat', brokers: [process.argv[2]], logLevel: logLevel.ERROR })
const fail = e => { console.error('failed:', e); process.exit(1) }
async function main() {
  const admin = kafka.admin(); await admin.connect()
  const topic = 'kafkajs-' + process.pid
  await admin.createTopics({ topics: [{ topic, numPartitions: 3 }] })
  const producer = kafka.producer({ idempotent: true, maxInFlightRequests: 1 }); await producer.connect()
  const total = 3000
  for (let n = 0; n < total; n += 500) {
    const messages = Array.from({ length: 500 }, (_, i) => ({ key: String((n + i) % 7), value: String(n + i), headers: { h: 'x' } }))
    await producer.send({ topic, messages, acks: -1, compression: n % 1000 ? CompressionTypes.GZIP : CompressionTypes.None })
  }
  await producer.disconnect()
  const seen = new Set(), last = {}
  const consumer = kafka.consumer({ groupId: topic }); await consumer.connect()
  await consumer.subscribe({ topics: [topic], fromBeginning: true })
  await new Promise((done, reject) => {
    consumer.run({ eachMessage: async ({ message }) => {
      const n = Number(message.value), key = message.key.toString()
      if (seen.has(n)) reject(new Error('twice: ' + n))
      if (last[key] !== undefined && last[key] >= n) reject(new Error('out of order: ' + n))
      seen.add(n); last[key] = n
      if (seen.size === total) done()
    } }).catch(reject)
    setTimeout(() => reject(new Error('only ' + seen.size)), 40000).unref()
  })
  await consumer.disconnect()
  const offsets = await admin.fetchOffsets({ groupId: topic, topics: [topic] })
  const committed = offsets[0].partitions.reduce((s, p) => s + Number(p.offset), 0)
  if (committed !== total) throw new Error('committed ' + committed)
  const groups = await admin.describeGroups([topic])
  if (groups.groups[0].state !== 'Empty') throw new Error(groups.groups[0].state)
  await admin.deleteGroups([topic]); await admin.deleteTopics({ topics: [topic] }); await admin.disconnect()
  console.log('all read ' + seen.size)
}
main().catch(fail)

// franz-go against a broker: idempotent producing with every codec, a consumer group, and admin requests.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "failed:", err)
		os.Exit(1)
	}
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	seed := kgo.SeedBrokers(os.Args[1])
	admin, err := kgo.NewClient(seed)
	must(err)
	create := kmsg.NewPtrCreateTopicsRequest()
	topic := kmsg.NewCreateTopicsRequestTopic()
	topic.Topic, topic.NumPartitions, topic.ReplicationFactor = "franz", 4, 1
	create.Topics = append(create.Topics, topic)
	created, err := create.RequestWith(ctx, admin)
	must(err)
	must(kerr.ErrorForCode(created.Topics[0].ErrorCode))

	const each = 2000
	codecs := []kgo.CompressionCodec{
		kgo.NoCompression(), kgo.GzipCompression(), kgo.SnappyCompression(), kgo.Lz4Compression(), kgo.ZstdCompression(),
	}
	for c, codec := range codecs {
		client, err := kgo.NewClient(seed, kgo.ProducerBatchCompression(codec), kgo.DefaultProduceTopic("franz"))
		must(err)
		for n := 0; n < each; n++ {
			record := &kgo.Record{
				Key: []byte(fmt.Sprint(n % 17)), Value: []byte(fmt.Sprintf("%d/%d", c, n)),
				Headers: []kgo.RecordHeader{{Key: "codec", Value: []byte{byte(c)}}},
			}
			client.Produce(ctx, record, func(_ *kgo.Record, err error) { must(err) })
		}
		must(client.Flush(ctx))
		client.Close()
	}

	consumer, err := kgo.NewClient(seed, kgo.ConsumerGroup("franz-group"), kgo.ConsumeTopics("franz"),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.DisableAutoCommit())
	must(err)
	seen := map[string]bool{}
	for len(seen) < each*len(codecs) {
		fetches := consumer.PollFetches(ctx)
		for _, e := range fetches.Errors() {
			must(e.Err)
		}
		fetches.EachRecord(func(r *kgo.Record) {
			if seen[string(r.Value)] {
				must(fmt.Errorf("twice: %s", r.Value))
			}
			seen[string(r.Value)] = true
		})
	}
	must(consumer.CommitUncommittedOffsets(ctx))
	consumer.Close()
	fmt.Println("franz-go: all read", len(seen))
}

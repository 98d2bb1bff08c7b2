// sarama against a broker: sync and idempotent async producing, a consumer group with two members, and admin requests.
package main

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/IBM/sarama"
)

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "failed:", err)
		os.Exit(1)
	}
}

const topic, total = "sarama", 5000

// All members note what they see here.
type handler struct {
	mu   sync.Mutex
	seen map[string]bool
	done chan struct{}
}

func (h *handler) Setup(sarama.ConsumerGroupSession) error   { return nil }
func (h *handler) Cleanup(sarama.ConsumerGroupSession) error { return nil }
func (h *handler) ConsumeClaim(s sarama.ConsumerGroupSession, claim sarama.ConsumerGroupClaim) error {
	for message := range claim.Messages() {
		h.mu.Lock()
		h.seen[string(message.Value)] = true
		if len(h.seen) == total {
			close(h.done)
		}
		h.mu.Unlock()
		s.MarkMessage(message, "")
	}
	return nil
}

func main() {
	brokers := []string{os.Args[1]}
	config := sarama.NewConfig()
	config.Version = sarama.MaxVersion
	config.Producer.Return.Successes = true
	config.Producer.RequiredAcks = sarama.WaitForAll
	config.Producer.Idempotent = true
	config.Net.MaxOpenRequests = 1
	config.Producer.Compression = sarama.CompressionZSTD
	config.Consumer.Offsets.Initial = sarama.OffsetOldest

	admin, err := sarama.NewClusterAdmin(brokers, config)
	must(err)
	must(admin.CreateTopic(topic, &sarama.TopicDetail{NumPartitions: 4, ReplicationFactor: 1}, false))

	sync1, err := sarama.NewSyncProducer(brokers, config)
	must(err)
	for n := 0; n < 50; n++ {
		_, _, err := sync1.SendMessage(&sarama.ProducerMessage{Topic: topic, Value: sarama.StringEncoder(fmt.Sprint(n))})
		must(err)
	}
	must(sync1.Close())
	async, err := sarama.NewAsyncProducer(brokers, config)
	must(err)
	go func() {
		for n := 50; n < total; n++ {
			key := sarama.StringEncoder(fmt.Sprint(n % 11))
			async.Input() <- &sarama.ProducerMessage{Topic: topic, Key: key, Value: sarama.StringEncoder(fmt.Sprint(n))}
		}
	}()
	for n := 50; n < total; n++ {
		select {
		case <-async.Successes():
		case err := <-async.Errors():
			must(err)
		}
	}
	must(async.Close())

	h := &handler{seen: map[string]bool{}, done: make(chan struct{})}
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	var members []sarama.ConsumerGroup
	for range 2 {
		group, err := sarama.NewConsumerGroup(brokers, "sarama-group", config)
		must(err)
		members = append(members, group)
		go func() {
			for ctx.Err() == nil {
				if err := group.Consume(ctx, []string{topic}, h); err != nil && ctx.Err() == nil && err != sarama.ErrClosedConsumerGroup {
					must(err)
				}
			}
		}()
	}
	select {
	case <-h.done:
	case <-ctx.Done():
		must(fmt.Errorf("only %d were read", len(h.seen)))
	}
	for _, group := range members {
		must(group.Close())
	}
	cancel()
	offsets, err := admin.ListConsumerGroupOffsets("sarama-group", map[string][]int32{topic: {0, 1, 2, 3}})
	must(err)
	committed := int64(0)
	for p := int32(0); p < 4; p++ {
		committed += offsets.GetBlock(topic, p).Offset
	}
	if committed != total {
		must(fmt.Errorf("committed %d of %d", committed, total))
	}
	must(admin.DeleteTopic(topic))
	fmt.Println("all read", len(h.seen))
}

// Writes records by a Sarama from before 1.45.1, whose compressed batches state no largest timestamp: ADDRESS TOPIC CODEC COUNT.
package main

import (
	"fmt"
	"os"
	"strconv"

	"github.com/IBM/sarama"
)

func main() {
	codecs := map[string]sarama.CompressionCodec{"gzip": sarama.CompressionGZIP, "snappy": sarama.CompressionSnappy, "lz4": sarama.CompressionLZ4, "zstd": sarama.CompressionZSTD}
	address, topic, codec := os.Args[1], os.Args[2], os.Args[3]
	count, err := strconv.Atoi(os.Args[4])
	check(err)
	config := sarama.NewConfig()
	config.Version = sarama.V2_1_0_0
	config.Producer.Compression = codecs[codec]
	config.Producer.Return.Successes = true
	producer, err := sarama.NewSyncProducer([]string{address}, config)
	check(err)
	var messages []*sarama.ProducerMessage
	for n := 0; n < count; n++ {
		messages = append(messages, &sarama.ProducerMessage{Topic: topic, Value: sarama.StringEncoder(strconv.Itoa(n))})
	}
	check(producer.SendMessages(messages))
	check(producer.Close())
	fmt.Println("written", count)
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

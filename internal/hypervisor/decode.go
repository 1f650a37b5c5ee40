package hypervisor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// DecodeStrict reads what another host has sent: one JSON value of at most limit
// bytes, without unknown fields, and nothing behind it.
func DecodeStrict(data []byte, limit int, into any) error {
	if len(data) > limit {
		return fmt.Errorf("it has %d bytes, more than %d", len(data), limit)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows it")
	}
	return nil
}

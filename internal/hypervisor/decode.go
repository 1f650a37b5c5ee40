package hypervisor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// OfferedBy is the hypervisor that another host names in what it has sent, empty
// if it names none; not ok if that cannot be read.
func OfferedBy(data []byte, limit int) (hypervisor string, ok bool) {
	var of struct {
		Hypervisor string `json:"hypervisor"`
	}
	ok = len(data) <= limit && json.Unmarshal(data, &of) == nil
	return of.Hypervisor, ok
}

// DecodeVersion reads what another host has sent like DecodeStrict, in the given
// version of its format. What is of another version is told as that, and not as
// what this one does not know in it.
func DecodeVersion(data []byte, limit, version int, into any) error {
	var of struct {
		Version int `json:"version"`
	}
	if len(data) <= limit && json.Unmarshal(data, &of) == nil && of.Version != version {
		return fmt.Errorf("it has version %d, not %d; run the same lmctl on both hosts", of.Version, version)
	}
	return DecodeStrict(data, limit, into)
}

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

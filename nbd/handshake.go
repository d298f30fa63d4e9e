package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"basalt/nbd/wire"
)

const (
	maxOptions     = 16384   // of one handshake; a client that lists thousands of exports needs a few for each
	maxOptionDrain = 1 << 20 // longest option data that is read and thrown away
)

const contextAllocation = "base:allocation"

// haggling is the state of a handshake.
type haggling struct {
	c          *conn
	client     wire.ClientFlags
	structured bool
	metaName   string // export whose metadata context was selected
	metaSet    bool   // base:allocation is selected
	entered    bool   // the transmission phase follows
}

// handshake negotiates until the client enters transmission, and then returns
// nil, or leaves. If the connection's export is open afterwards, it is counted.
func (c *conn) handshake(ctx context.Context) error {
	h := &haggling{c: c}
	if err := h.send(wire.AppendGreeting(nil)); err != nil {
		return err
	}
	var raw [wire.ClientFlagsSize]byte
	if err := h.read(raw[:]); err != nil {
		return err
	}
	var err error
	if h.client, err = wire.DecodeClientFlags(raw[:]); err != nil {
		return err
	}
	for range maxOptions {
		if err := h.option(ctx); err != nil || h.entered {
			return err
		}
	}
	return fmt.Errorf("%w: more than %d options", wire.ErrMalformed, maxOptions)
}

// timed does one step that the client may hold up, and closes the connection
// when that takes longer than the handshake timeout. What the Exports do is not
// timed.
func (h *haggling) timed(step func() error) error {
	t := h.c.server.clk.NewTimer(h.c.server.opts.HandshakeTimeout)
	defer t.Stop()
	var watch sync.WaitGroup
	defer watch.Wait()
	stop := make(chan struct{})
	defer close(stop)
	watch.Go(func() {
		select {
		case <-t.C:
			h.c.log.Info("client is silent in the handshake, closing the connection")
			_ = h.c.nc.Close()
		case <-stop:
		}
	})
	if err := step(); err != nil {
		return h.c.ioError(err)
	}
	return nil
}

// read fills b from the client.
func (h *haggling) read(b []byte) error {
	return h.timed(func() error {
		_, err := io.ReadFull(h.c.br, b)
		return err
	})
}

// discard reads n bytes and throws them away.
func (h *haggling) discard(n int64) error {
	return h.timed(func() error {
		_, err := io.CopyN(io.Discard, h.c.br, n)
		return err
	})
}

// send sends b to the client.
func (h *haggling) send(b []byte) error {
	return h.timed(func() error {
		_, err := h.c.nc.Write(b)
		return err
	})
}

// option reads and answers one option.
func (h *haggling) option(ctx context.Context) error {
	var raw [wire.OptionHeaderSize]byte
	if err := h.read(raw[:]); err != nil {
		return err
	}
	o, err := wire.DecodeOptionHeader(raw[:])
	switch {
	case err != nil:
		return err
	case o.Option != wire.OptExportName && h.client&wire.ClientFixedNewstyle == 0:
		return fmt.Errorf("%w: option %d without fixed newstyle", wire.ErrMalformed, o.Option)
	case o.LenBytes > maxOptionDrain, o.LenBytes > wire.MaxOption && o.Option == wire.OptExportName:
		return fmt.Errorf("%w: option %d with %d bytes", wire.ErrMalformed, o.Option, o.LenBytes)
	case o.LenBytes > wire.MaxOption:
		if err := h.discard(int64(o.LenBytes)); err != nil {
			return err
		}
		return h.fail(o.Option, wire.RepErrTooBig, "option data is too long")
	}
	data := make([]byte, o.LenBytes)
	if err := h.read(data); err != nil {
		return err
	}
	return h.answer(ctx, o.Option, data)
}

// answer acts on one option.
func (h *haggling) answer(ctx context.Context, opt wire.Option, data []byte) error {
	switch opt {
	case wire.OptExportName:
		return h.exportName(ctx, data)
	case wire.OptInfo, wire.OptGo:
		return h.info(ctx, opt, data)
	case wire.OptListMetaContext, wire.OptSetMetaContext:
		return h.metaContext(ctx, opt, data)
	case wire.OptAbort:
		// The client may be gone already, so whether this arrives is its affair.
		_ = h.send(wire.AppendOptionReply(nil, opt, wire.RepAck, nil))
		return errEnded
	case wire.OptList, wire.OptStructuredReply:
		if len(data) != 0 {
			return h.fail(opt, wire.RepErrInvalid, "option takes no data")
		}
		if opt == wire.OptList {
			return h.list(ctx)
		}
		h.structured = true
		return h.ack(opt)
	default: // NBD_OPT_STARTTLS too
		return h.fail(opt, wire.RepErrUnsupported, "option is not supported")
	}
}

// list answers OptList.
func (h *haggling) list(ctx context.Context) error {
	names, err := h.c.server.exports.List(ctx)
	if err != nil {
		return h.fail(wire.OptList, optionReplyOf(err), clientText(err))
	}
	var out []byte
	for _, name := range names {
		if !wire.IsString(name) {
			h.c.log.Error("export name cannot be told to clients", "name", name)
			continue
		}
		out = wire.AppendServer(out, name)
		if len(out) > wire.MaxOption {
			if err := h.send(out); err != nil {
				return err
			}
			out = out[:0]
		}
	}
	return h.send(wire.AppendOptionReply(out, wire.OptList, wire.RepAck, nil))
}

// exportName answers OptExportName, which knows no failure but the end.
func (h *haggling) exportName(ctx context.Context, data []byte) error {
	name, err := wire.DecodeName(data)
	if err != nil {
		return err
	}
	if err := h.open(ctx, name); err != nil {
		return fmt.Errorf("nbd: opening export %q: %w", name, err)
	}
	tx := &h.c.tx
	return h.send(wire.AppendExportName(nil, uint64(tx.info.SizeBytes), tx.flags(), h.client))
}

// info answers OptInfo, and OptGo, which also opens the export.
func (h *haggling) info(ctx context.Context, opt wire.Option, data []byte) error {
	q, err := wire.DecodeInfoRequest(data)
	if err != nil {
		return h.fail(opt, wire.RepErrInvalid, clientText(err))
	}
	about := transmission{structured: h.structured}
	if opt == wire.OptGo {
		err = h.open(ctx, q.Name)
		about = h.c.tx
	} else if about.info, err = h.c.server.exports.Describe(ctx, q.Name); err == nil {
		about.info, err = about.info.withDefaults()
	}
	if err != nil {
		if errors.Is(err, errEnded) {
			return err
		}
		return h.fail(opt, optionReplyOf(err), clientText(err))
	}
	i := about.info
	out := wire.AppendInfoExport(nil, opt, uint64(i.SizeBytes), about.flags())
	// The sizes are told whether asked for or not: they are enforced.
	out = wire.AppendInfoBlockSize(out, opt, i.MinBlock, i.PreferredBlock, i.MaxBlock)
	for _, typ := range q.Types {
		switch {
		case typ == wire.InfoName:
			out = wire.AppendInfoText(out, opt, typ, q.Name)
		case typ == wire.InfoDescription && i.Description != "":
			out = wire.AppendInfoText(out, opt, typ, i.Description)
		}
		if len(out) > wire.MaxOption { // the same type asked for again and again
			break
		}
	}
	return h.send(wire.AppendOptionReply(out, opt, wire.RepAck, nil))
}

// open opens the export and makes the connection count for it. The client must
// not be told yet: its first request is then ordered after all requests of
// connections to the export that have ended before.
func (h *haggling) open(ctx context.Context, name string) error {
	c := h.c
	e, err := c.server.exports.Open(ctx, name)
	if err != nil {
		return err
	}
	i, err := e.Info().withDefaults()
	if err == nil {
		err = c.server.awaitGone(ctx, c, name)
	}
	if err == nil {
		err = c.enterTransmission(name)
	}
	if err != nil {
		return errors.Join(err, e.Close())
	}
	c.tx = transmission{
		export:     e,
		info:       i,
		structured: h.structured,
		allocation: h.metaSet && h.metaName == name,
	}
	h.entered = true
	return nil
}

// metaContext answers OptListMetaContext and OptSetMetaContext. The wildcard
// "base:" is for listing only: selecting needs a context's full name.
func (h *haggling) metaContext(ctx context.Context, opt wire.Option, data []byte) error {
	sets := opt == wire.OptSetMetaContext
	if sets {
		h.metaSet = false // replaced, even by a selection that fails
	}
	q, err := wire.DecodeMetaRequest(data)
	if err != nil {
		return h.fail(opt, wire.RepErrInvalid, clientText(err))
	}
	if !h.structured {
		return h.fail(opt, wire.RepErrInvalid, "structured replies come first")
	}
	if _, err := h.c.server.exports.Describe(ctx, q.Name); err != nil {
		return h.fail(opt, optionReplyOf(err), clientText(err))
	}
	found := !sets && len(q.Queries) == 0
	for _, query := range q.Queries {
		found = found || query == contextAllocation || !sets && query == "base:"
	}
	var out []byte
	if found {
		id := uint32(0) // reserved in a list
		if sets {
			id = allocationID
			h.metaName, h.metaSet = q.Name, true
		}
		out = wire.AppendMetaContext(nil, opt, id, contextAllocation)
	}
	return h.send(wire.AppendOptionReply(out, opt, wire.RepAck, nil))
}

func (h *haggling) ack(opt wire.Option) error {
	return h.send(wire.AppendOptionReply(nil, opt, wire.RepAck, nil))
}

// fail refuses an option; the handshake goes on.
func (h *haggling) fail(opt wire.Option, rep wire.OptionReply, text string) error {
	return h.send(wire.AppendOptionReply(nil, opt, rep, []byte(text)))
}

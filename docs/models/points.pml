/* Consistent points of a volume of two blocks: host, primary, record, sender, link, receiver; then
   promote and failback.

   Everything is one process that picks what happens next, so a state is the globals alone.  Disks are
   volatile: of what was not flushed each block is there after a power cut, or is not.  A commit page is
   one step, since it is written to the other of two slots.

   Checked in every state:
   I1 what the receiver would have after a recovery is the volume's content at the cut of the point that
      its commit page names;
   I2 where the primary, after a power cut or without one, differs from that, the record names the block;
   I3 the receiver has every point that the sender was told of;
   I4 after promote (of the last point, or of the one before it), writes there and failback both sides
      are equal.

   Against the code: the first copy has come through already (before it there is no point); the queue of
   committed points holds one, where the receiver queues sixteen; an extent is a block.  Each BUG_ is a
   mistake that gives a counterexample, each WITNESS_ a good end that is reached. */

#ifndef WRITES
#define WRITES 2      /* of block 0; block 1 follows each */
#endif
#ifndef POINTS
#define POINTS 2      /* cuts */
#endif
#ifndef CRASHES
#define CRASHES 1     /* power cuts of the sender */
#endif
#ifndef FALLS
#define FALLS 1       /* power cuts of the receiver */
#endif
#ifndef LINKS
#define LINKS 1       /* losses of the link alone */
#endif
#ifndef AHEAD
#define AHEAD 0       /* blocks that are sent before the cut */
#endif

/* The primary's side: what reads return, what is durable; the record; the sender's memory. */
byte pv[2], pd[2];
bool rec[2];
bool dirty[2], pend[2], spooled[2];
byte sp[2], sent[2];               /* `sent`: the stamp of the last sending towards the open point */
byte stamp, inc = 1, point = 1;
mtype = { OPEN, READING, ENDED };
mtype phase = OPEN;
bool flushed, heard;               /* since END; that the point is committed */
byte cutv[2];                      /* the content at the cut */
byte told;                         /* the newest point that the sender was told of */

/* Between them. */
bool up, end_sent;

/* The receiver: the open point in the journal, the commit page, the committed point, the image. */
byte jv[2], js[2], jinc = 1; bool jdur[2];
bool committing; byte ccut[2];     /* END was right; the content at its cut */
byte committed; bool queued;
bool cin[2]; byte cv[2]; bool cdur[2];
byte iv[2], id[2]; bool done[2];   /* image: read, durable; what of the queued point was written */
byte want[2];                      /* what the committed point has to be */
byte old[2]; bool changed[2];      /* the point before it, and what the two differ in */

byte cuts, crashes, falls, links, ahead, resumed;
bool over, lost;

#define RCV(b)   (queued && cin[b] -> (cdur[b] -> cv[b] : 99) : id[b])
#define DIFF(b)  ((pv[b] != RCV(b) || pd[b] != RCV(b)) && !rec[b])
#define KEEPS(b) (dirty[b] || pend[b] || spooled[b])
#define CHECK    assert(RCV(0) == want[0] && RCV(1) == want[1]); \
                 assert(!DIFF(0) && !DIFF(1)); \
                 assert(told <= committed)

inline write(b, value) {
#ifndef BUG_NO_CBW
  if :: pend[b] -> sp[b] = pv[b]; spooled[b] = 1; pend[b] = 0 :: else fi;
#endif
  rec[b] = 1;
#ifdef BUG_AHEAD_OVERTAKEN
  if :: phase == OPEN && sent[b] -> skip :: else -> dirty[b] = 1 fi;
#else
  dirty[b] = 1;
#endif
  pv[b] = value
}

inline send(b) {
  stamp++; sent[b] = stamp; spooled[b] = 0;
  if
  :: jv[b] = sp[b]; js[b] = stamp; jdur[b] = 0
  :: links < LINKS -> links++; link_lost()          /* and it never arrives */
  fi
}

inline link_lost() { up = 0; end_sent = 0 }

inline settle(b) {
#ifdef BUG_CLEAR_WHILE_DIRTY
  if :: sent[b] -> rec[b] = 0 :: else fi;
#else
  if :: sent[b] && !KEEPS(b) -> rec[b] = 0 :: else fi;
#endif
  sent[b] = 0
}

inline next_point() {
  settle(0); settle(1);
  point++; phase = OPEN; flushed = 0; heard = 0
}

inline compare(b) {                                  /* HAVE */
#ifdef BUG_BLOCKS_NOT_STAMPS
  if :: sent[b] && !js[b] -> sent[b] = 0; dirty[b] = 1; lost = 1 :: else fi
#else
#ifndef BUG_HAVE_IGNORED
  if :: sent[b] && js[b] != sent[b] -> sent[b] = 0; dirty[b] = 1; lost = 1 :: else fi
#else
  skip
#endif
#endif
}

inline greet() {                                     /* HELLO2, both ways */
  up = 1; lost = 0;
  if
  :: jinc != inc ->
#ifndef BUG_RESUME_OTHER
     js[0] = 0; js[1] = 0;
#endif
     jinc = inc
  :: else
  fi;
  if :: point == 0 -> point = committed + 1 :: else fi;
  told = (committed > told -> committed : told);
  if
  :: committed == point -> heard = 1
  :: else ->
     compare(0); compare(1);
     if
     :: lost && phase != OPEN ->                     /* the cut is given up; what was read goes on */
        dirty[0] = dirty[0] || pend[0]; dirty[1] = dirty[1] || pend[1];
        pend[0] = 0; pend[1] = 0; phase = OPEN; flushed = 0
     :: lost && phase == OPEN
     :: !lost -> end_sent = (phase == ENDED); if :: sent[0] || sent[1] -> resumed = 1 :: else fi
     fi
  fi
}

#ifdef BUG_END_UNCHECKED
#define SAME(b) true
#elif defined(BUG_BLOCKS_NOT_STAMPS)
#define SAME(b) (!sent[b] == !js[b])
#else
#define SAME(b) (sent[b] == js[b])
#endif

inline queue(b) { cin[b] = (js[b] != 0); cv[b] = jv[b]; cdur[b] = jdur[b]; js[b] = 0; done[b] = 0 }

inline power_cut_of_primary(b) { if :: pv[b] = pd[b] :: pd[b] = pv[b] fi }

inline forget(b) { dirty[b] = rec[b]; pend[b] = 0; spooled[b] = 0; sent[b] = 0 }

inline power_cut_of_receiver(b) {
  if :: js[b] && !jdur[b] -> js[b] = 0 :: js[b] -> jdur[b] = 1 :: else fi;
  if :: iv[b] = id[b] :: id[b] = iv[b] fi;
  done[b] = 0
}

inline failover() {                                  /* the primary's site is lost, and comes back */
  byte r[2]; bool q[2];
  over = 1;
  if
  :: r[0] = RCV(0); r[1] = RCV(1)
  :: committed > 0 && !queued ->                     /* the point before */
     r[0] = old[0]; r[1] = old[1];
#ifndef BUG_OLD_WITHOUT_LIST
     q[0] = changed[0]; q[1] = changed[1]
#endif
  fi;
  if :: r[0] = 98; q[0] = 1 :: skip fi;              /* hosts write there */
  if :: r[1] = 98; q[1] = 1 :: skip fi;
  power_cut_of_primary(0); power_cut_of_primary(1);
#ifdef BUG_FAILBACK_ONE_RECORD
  if :: q[0] -> pv[0] = r[0] :: else fi; if :: q[1] -> pv[1] = r[1] :: else fi;
#else
  if :: q[0] || rec[0] -> pv[0] = r[0] :: else fi; if :: q[1] || rec[1] -> pv[1] = r[1] :: else fi;
#endif
  assert(pv[0] == r[0] && pv[1] == r[1]);            /* I4 */
#ifdef WITNESS_BACK
  assert(committed < 2 || !q[0])
#endif
}

active proctype World() {
  do
  /* The host: block 0, a flush, block 1 with the same number, a flush. */
  :: atomic { !over && pv[1] == pv[0] && pd[1] == pv[1] && pv[0] < WRITES -> write(0, pv[0] + 1); CHECK }
  :: atomic { !over && pv[1] < pv[0] && pd[0] == pv[0] -> write(1, pv[0]); CHECK }
  :: atomic { !over && pd[0] != pv[0] -> pd[0] = pv[0]; CHECK }
  :: atomic { !over && pd[1] != pv[1] -> pd[1] = pv[1]; CHECK }

  /* The sender. */
  :: atomic { !over && phase == OPEN && up && !heard && cuts < POINTS && (dirty[0] || dirty[1]) ->
       cuts++; phase = READING; cutv[0] = pv[0]; cutv[1] = pv[1];
       pend[0] = dirty[0]; pend[1] = dirty[1]; dirty[0] = 0; dirty[1] = 0; CHECK }
  :: atomic { !over && phase == OPEN && up && ahead < AHEAD && dirty[0] ->
       ahead++; sp[0] = pv[0]; spooled[0] = 1; dirty[0] = 0; CHECK }
  :: atomic { !over && pend[0] -> sp[0] = pv[0]; spooled[0] = 1; pend[0] = 0; CHECK }
  :: atomic { !over && pend[1] -> sp[1] = pv[1]; spooled[1] = 1; pend[1] = 0; CHECK }
  :: atomic { !over && up && spooled[0] -> send(0); CHECK }
  :: atomic { !over && up && spooled[1] -> send(1); CHECK }
  :: atomic { !over && up && phase == READING && !pend[0] && !pend[1] && !spooled[0] && !spooled[1] ->
       phase = ENDED; end_sent = 1; flushed = 0;
#ifdef BUG_CLEAR_AT_SENT
       if :: sent[0] && !KEEPS(0) -> rec[0] = 0 :: else fi;
       if :: sent[1] && !KEEPS(1) -> rec[1] = 0 :: else fi;
#endif
       CHECK }
  :: atomic { !over && phase == ENDED && !flushed -> pd[0] = pv[0]; pd[1] = pv[1]; flushed = 1; CHECK }
#ifdef BUG_NO_PRIMARY_FLUSH
  :: atomic { !over && phase == ENDED && heard -> next_point(); CHECK }
#else
  :: atomic { !over && phase == ENDED && heard && flushed -> next_point(); CHECK }
#endif

  /* The receiver: END, flush and commit page, COMMITTED. */
  :: atomic { !over && up && end_sent && !committing && SAME(0) && SAME(1) ->
       end_sent = 0; committing = 1; ccut[0] = cutv[0]; ccut[1] = cutv[1];
#ifdef BUG_TOLD_EARLY
       heard = 1; told = point;
#endif
       CHECK }
#ifndef BUG_COMMIT_BEFORE_FLUSH
  :: atomic { !over && committing && ((js[0] && !jdur[0]) || (js[1] && !jdur[1])) ->
       jdur[0] = 1; jdur[1] = 1; CHECK }
  :: atomic { !over && committing && !queued && (!js[0] || jdur[0]) && (!js[1] || jdur[1]) ->
#else
  :: atomic { !over && committing && !queued ->
#endif
       committing = 0; committed++; queued = 1;
       old[0] = want[0]; old[1] = want[1]; want[0] = ccut[0]; want[1] = ccut[1];
       changed[0] = (js[0] != 0); changed[1] = (js[1] != 0);
       queue(0); queue(1);
#ifdef WITNESS_TWO_POINTS
       assert(committed < 2);
#endif
#ifdef WITNESS_RESUMED
       assert(!resumed);
#endif
       CHECK }
  :: atomic { !over && up && committed == point && !heard && phase == ENDED -> heard = 1; told = committed; CHECK }

  /* It applies: block by block, a flush, the commit page. */
  :: atomic { !over && queued && !done[0] -> if :: cin[0] -> iv[0] = cv[0] :: else fi; done[0] = 1; CHECK }
  :: atomic { !over && queued && !done[1] -> if :: cin[1] -> iv[1] = cv[1] :: else fi; done[1] = 1; CHECK }
  :: atomic { !over && queued && done[0] && done[1] && (id[0] != iv[0] || id[1] != iv[1]) ->
       id[0] = iv[0]; id[1] = iv[1]; CHECK }
#ifdef BUG_APPLIED_EARLY
  :: atomic { !over && queued && done[0] && done[1] -> queued = 0; CHECK }
#else
  :: atomic { !over && queued && done[0] && done[1] && id[0] == iv[0] && id[1] == iv[1] -> queued = 0; CHECK }
#endif

  /* What goes wrong. */
#ifdef BUG_HELLO_WHILE_COMMITTING
  :: atomic { !over && !up -> greet(); CHECK }
#else
  :: atomic { !over && !up && !committing -> greet(); CHECK }
#endif
  :: atomic { !over && up && links < LINKS -> links++; link_lost(); CHECK }
  :: atomic { !over && crashes < CRASHES ->
       crashes++; inc++; stamp = 0; link_lost();
       power_cut_of_primary(0); power_cut_of_primary(1);
       forget(0); forget(1); phase = OPEN; flushed = 0; heard = 0; point = 0; CHECK }
  :: atomic { !over && falls < FALLS ->
       falls++; link_lost(); committing = 0;
       power_cut_of_receiver(0); power_cut_of_receiver(1); CHECK }
  :: atomic { !over -> failover() }
  :: over -> break
  od
}

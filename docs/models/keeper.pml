/* A keeper: node 2 has no way to the media and holds the record of node 1, the host.  One extent;
   its content is one bit: whether primary and secondary may differ.

   What the names stand for:
     own, dirty, lH   the host's record R in memory, its dirt, its stored record
     volH    flag VOLATILE of the host: its stored record may lack something
     joins   its record is a new one, for a machine that was lost: it names nothing
     p, lK   what the keeper has granted, its stored record
     bad, failed   the host's record device takes no writes; it has failed once, and does so no more
     mark    on the host's own disk: its record may lack something, which that could not say
     lacks, lacksK   what it has granted may not be all: durable in its superblock (GONE_ON), and of
             a keeper that lives (the host may go on in a cut)
     ahead   the host has gone on alone in a generation that the keeper does not know
     hfresh, hjoins, hvol, hbad, klacks   what HELLO said;  said   what the keeper's RECORD did
     told    the administrator has said that nobody is given the keeper's record as it is
     upH, upK   0 no link, 1 HELLO and RECORD sent, 2 RECORD learnt, 3 READY sent, 4 paired

   Modes: -DRELY: record_on = partner.  -DSTORE: the keeper stores before it grants.  -DGO_ON: the
   host goes on in a cut.
   -DFAILS: the host's record fails once, and it counts on the keeper then (record_fallback).

   Checked in every state: a host that knows names what differs, and it is dirty there; and where
   nothing goes on any more both have met, nobody waits and nothing differs. */

#ifndef CUTS
#define CUTS 1
#endif
#ifndef CRASHES
#define CRASHES 2
#endif
#ifdef FAILS
#define HBAD hbad
#else
#define HBAD 0
#endif
#ifdef RELY
#define RELIES 1
#else
#define RELIES HBAD            /* record_fallback */
#endif
#ifdef STORE
#define STORES 1
#else
#define STORES 0
#endif
#ifdef GO_ON
#define GOES_ON 1
#else
#define GOES_ON 0
#endif
#define IN_MEMORY (RELIES && !STORES)     /* what is granted stands in the keeper's memory only */
#ifdef BUG_KEEPER_PASSES_FOR_COMPLETE
#define MAY_LACK 0
#else
#define MAY_LACK (GOES_ON || !STORES)
#endif

mtype = { ADD, GRANT, REMOVE, RECORD, READY, BYE };
chan toH = [4] of { mtype, bit };
chan toK = [4] of { mtype, bit };

bit own, dirty, lH, volH, joins, p, lK, lacks = MAY_LACK, lacksK = GOES_ON, ahead, told;
bit hfresh, hjoins, hvol, hbad, klacks, said, bad, failed, mark;
bit aliveH = 1, aliveK = 1, knownH = 1, knownK = 1, alone, relies, settlesH, settlesK;
bit conn, differ, want, wait, compared, fetched;
byte upH, upK, writes = 2, cuts, crashes, lost, byes;

#define NOBODY_KNOWS (hfresh && (hjoins || hvol) && klacks)
#define SENDH(t, b) if :: conn -> assert(nfull(toH)); toH!t(b) :: else fi
#define SENDK(t, b) if :: conn -> assert(nfull(toK)); toK!t(b) :: else fi

inline flush_link() { conn = 0; do :: toH?_,_ :: toK?_,_ :: empty(toH) && empty(toK) -> break od }
inline die_H() {
  flush_link(); aliveH = 0; knownH = 0; alone = 0; relies = 0; settlesH = 0; upH = 0;
  own = 0; dirty = 0; want = 0; wait = 0; crashes++
}
inline forget_K() { knownK = 0; lacksK = 0; settlesK = 0; upK = 0; p = 0 }

active proctype Host() {
  bit s;
  do
  :: atomic { aliveH && knownH && writes && !wait -> writes--; wait = 1 }
  :: atomic { wait && own && (lH || relies) -> wait = 0; differ = 1; dirty = 1 }
  :: atomic { wait && !own && !want && upH == 4 -> want = 1; SENDK(ADD, 0) }
  :: atomic { wait && !own && alone && !upH -> own = 1 }
  :: atomic { wait && !own && GOES_ON && knownH && !upH && !conn && !volH && !bad -> own = 1 }
  :: atomic { aliveH && own && !lH && !bad -> lH = 1 }
  :: atomic { aliveH && upH == 4 && conn && bad != HBAD -> flush_link() }         /* begins anew */
  :: atomic { aliveH && upH == 2 && conn && (HBAD -> joins : bad) -> flush_link() }  /* cannot write */
  :: atomic { dirty && (upH == 0 || upH == 4) -> dirty = 0; differ = 0 }
  :: atomic { own && !dirty && !wait && (upH == 0 || upH == 4) ->
       own = 0; if :: !bad -> lH = 0 :: true fi; if :: upH == 4 -> SENDK(REMOVE, 0) :: else fi }
  :: atomic { aliveH && settlesH && (upH == 0 || upH == 4) && (volH || mark) && !bad && (!own || lH) ->
       volH = 0; mark = 0 }

  :: atomic { aliveH && upH == 4 && toH?[GRANT] -> toH?GRANT(_); own = 1; want = 0 }
  :: atomic { aliveH && upH == 4 && toH?[BYE] -> toH?BYE(_);       /* the keeper's: go on alone */
       flush_link(); upH = 0; want = 0; relies = 0; settlesH = 1; alone = 1; ahead = 1 }
  :: atomic { aliveH && upH && !conn ->
       if :: alone && upH < 3 -> skip :: else -> alone = 0 fi;
       upH = 0; want = 0; relies = 0;
       if :: knownH -> settlesH = 1 :: else -> own = 0; dirty = 0 fi }
  :: atomic { aliveH && upH == 1 && toH?[RECORD] -> toH?RECORD(said); upH = 2 }
  /* It learns what will be its own: lazily stored, unless both store first. */
  :: atomic { aliveH && upH == 2 && conn && !lH && !bad && (NOBODY_KNOWS || said) -> lH = 1 }
  :: atomic { aliveH && upH == 2 && conn &&
       (HBAD -> !joins : !bad) &&
       (!STORES || HBAD || lH || !(own || NOBODY_KNOWS || (hfresh && said))) ->
#if defined(BUG_NEW_RECORD_IS_TRUSTED)
       if :: RELIES && !HBAD -> volH = 1 :: else fi;
#elif defined(BUG_RECORD_OF_WHO_RELIES_IS_TRUSTED)
       if :: (IN_MEMORY || joins || NOBODY_KNOWS) && !HBAD -> volH = 1 :: else fi;
#else
       if :: (RELIES || joins || NOBODY_KNOWS) && !HBAD -> volH = 1 :: else fi;
#endif
#ifndef BUG_FAILED_RECORD_IS_TRUSTED
       if :: HBAD -> mark = 1 :: else fi;
#endif
       joins = 0;
       upH = 3; SENDK(READY, 0) }
  :: atomic { aliveH && upH == 3 && toH?[READY] -> toH?READY(_);
       s = own;
       if
       :: NOBODY_KNOWS -> own = 1; compared = 1
       :: !NOBODY_KNOWS && hfresh ->
#ifdef BUG_KEEPER_UNASKED
          own = own || lH
#elif defined(BUG_OWN_RECORD_UNREAD)
          own = own || said
#else
          own = own || lH || said; fetched = fetched || (hjoins && said)
#endif
       :: !NOBODY_KNOWS && !hfresh -> skip
       fi;
       if :: own && !s -> dirty = 1 :: else fi;
       s = 0; said = 0; knownH = 1; alone = 0; told = 0; upH = 4; relies = RELIES;
       if :: !RELIES -> settlesH = 1 :: else fi }
  /* The administrator's word: on without the keeper, whose record nobody will be given. */
  :: atomic { aliveH && !upH && !conn && !alone && !joins && !bad && byes < 1 ->
       byes++; told = 1; ahead = 1;
       if
       :: knownH -> skip
#ifdef BUG_VOLATILE_IS_TRUSTED
       :: !knownH -> own = lH
#else
       :: !knownH && !volH -> own = lH
       :: !knownH && volH -> own = 1; compared = 1
#endif
       fi;
       if :: !knownH -> dirty = own :: else fi; knownH = 1; alone = 1; settlesH = 1 }
  od
}

active proctype Keeper() {
  bit o;
  do
  :: atomic { aliveK && p && !lK -> lK = 1 }
  :: atomic { aliveK && settlesK && (upK == 0 || upK == 4) && lacks != lacksK && (!p || lK) ->
       lacks = lacksK }
  :: atomic { aliveK && upK == 4 && toK?[ADD] && STORES && !lK -> lK = 1 }
  :: atomic { aliveK && upK == 4 && toK?[ADD] && (!STORES || lK) -> toK?ADD(_); p = 1; SENDH(GRANT, 0) }
  :: atomic { aliveK && upK == 4 && toK?[REMOVE] -> toK?REMOVE(_); p = 0; if :: lK = 0 :: true fi }
  :: atomic { aliveK && upK && !conn ->
       if :: upK == 3 && GOES_ON -> lacksK = 1 :: else fi;
       upK = 0; if :: knownK -> settlesK = 1 :: else -> p = 0 fi }
  :: atomic { aliveK && upK == 1 && toK?[RECORD] -> toK?RECORD(o);
       if :: o || NOBODY_KNOWS || (hfresh && (knownK -> p : lK)) -> p = 1 :: else fi; upK = 2 }
#ifdef BUG_READY_UNSTORED
  :: atomic { aliveK && upK == 2 && conn ->
#else
  :: atomic { aliveK && upK == 2 && conn && (!STORES || !p || lK) ->
#endif
#ifdef BUG_COMPLETE_BEFORE_READY
       lacks = MAY_LACK;
#else
       lacks = lacks || MAY_LACK;      /* a host that is alone goes on until it says READY */
#endif
       ahead = 0;
       upK = 3; SENDH(READY, 0) }
  :: atomic { aliveK && upK == 3 && toK?[READY] -> toK?READY(_);
       p = (hfresh -> p : o); o = 0; knownK = 1; upK = 4; lacksK = GOES_ON && MAY_LACK;
       if :: STORES -> settlesK = 1 :: else fi }
  /* An orderly stop: its record lacks what is written from BYE on, and says so first. */
  :: atomic { aliveK && upK == 4 && byes < 1 -> byes++;
#ifndef BUG_BYE_BEFORE_LACKS
       lacks = 1;
#endif
       SENDH(BYE, 0); aliveK = 0; forget_K(); o = 0 }
  od
}

active proctype World() {
  do
  :: atomic { conn && cuts < CUTS -> cuts++; flush_link() }
  :: atomic { conn && !aliveK && empty(toH) -> flush_link() }
  :: atomic { !conn && aliveH && aliveK && !upH && !upK ->
       if :: ahead && knownK -> forget_K() :: else fi;   /* outdated: it begins anew, fresh */
       conn = 1; upH = 1; upK = 1; hfresh = !knownH; hjoins = joins; hvol = volH;
       hbad = bad; klacks = (knownK -> lacksK : lacks);
       settlesH = 0; settlesK = 0;
       toK!RECORD(own || (lH && !knownH)); toH!RECORD((knownK -> p : lK)) }
  :: atomic { crashes < CRASHES && aliveH -> die_H() }
  :: atomic { crashes < CRASHES && aliveK -> flush_link(); aliveK = 0; forget_K(); crashes++ }
  :: atomic { !aliveH && !conn && !bad -> aliveH = 1; volH = volH || mark; mark = 0 }
#ifdef FAILS
  :: atomic { aliveH && !failed -> bad = 1; failed = 1 }
  :: atomic { bad -> bad = 0 }
#endif
  :: atomic { !aliveK && !conn -> aliveK = 1 }
  /* The host's machine is lost with its record: a new node 1 joins.  Or its record is: a new one
     that says VOLATILE passes for it. */
  :: atomic { !aliveH && !told && !lost && !joins ->
       lost = 1; lH = 0; mark = 0;
       if :: joins = 1; volH = 0 :: volH = 1 fi }
  od
}
active proctype Monitor() {
  atomic {
    (   (differ && aliveH && knownH && !(own && dirty))
#ifdef WITNESS_FETCHED
     || (fetched && !compared && upH == 4 && upK == 4 && !differ && !writes)
#endif
#ifdef WITNESS_COMPARED
     || (compared && lost && upH == 4 && upK == 4 && !differ && !writes)
#endif
#ifdef WITNESS_ALONE
     || (alone && differ && !aliveK && !p && !lK && writes == 0)
#endif
    ) -> assert(false)
  }
}
active proctype Rest() {
  timeout -> assert(upH == 4 && upK == 4 && !wait && !writes && !differ)
}
